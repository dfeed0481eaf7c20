"""Megatron-Core checkpoint, of any parallel layout -> Hugging Face directory that transformers and vLLM load."""

import re
import time
from pathlib import Path

import torch

from endprompt_megatron.convert import layout, llama
from endprompt_megatron.convert.card import model_card
from endprompt_megatron.convert.hf_files import write_weights
from endprompt_megatron.convert.progress import byte_progress
from endprompt_megatron.convert.to_megatron import Written
from endprompt_megatron.convert.torch_dist import Checkpoint
from endprompt_megatron.errors import InputError
from endprompt_megatron.files import read_json, refuse_existing, staged_directory, write_json, write_text
from endprompt_megatron.shape import ModelShape, shape_of

DEFAULT_SHARD = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert_megatron_to_hf(
    megatron: Path,
    out: Path,
    iteration: int | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str = DEFAULT_SHARD,
) -> Written:
    """Export a checkpoint: weights, config, generation config, tokenizer files and a model card.

    `megatron` is a checkpoint directory (its newest complete iteration, or `iteration`) or one iter_ directory.
    `dtype` None writes what the manifest says.  The padding of the vocabulary is cut, optimizer state is not read.
    Everything is checked before anything is written, and `out` appears when it is whole.  Raises InputError.
    """
    started = time.monotonic()
    source, out = layout.find_checkpoint(Path(megatron), iteration), Path(out)
    manifest = layout.read_manifest(source)
    hf = source / layout.HF_DIRECTORY
    config = read_json(hf / "config.json", "a Hugging Face config")
    shape = shape_of(config, str(hf / "config.json"))
    limit = parse_size(max_shard_size)
    refuse_existing(out, "--out")
    layout.check_tokenizer(hf, shape.vocab_size)
    pieces = list(llama.pieces(shape))
    checkpoint = Checkpoint(source)
    _check(checkpoint, manifest, shape, pieces)
    dtype = layout.parse_dtype(dtype) or manifest["dtype"]
    torch_dtype = getattr(torch, dtype)
    total = sum(piece.elements for piece in pieces) * torch_dtype.itemsize
    layout.require_space(out, total, "--out")

    def read(piece: llama.Piece) -> list[torch.Tensor]:
        return llama.split(piece, checkpoint.read(piece.key, piece.offset, piece.shape, torch_dtype))

    with byte_progress(total, "converting") as advance, staged_directory(out) as staging:
        write_weights(staging, pieces, read, dtype, limit, advance)
        layout.copy_hf_files(hf, staging)
        # transformers 5 reads dtype; transformers 4 and vLLM read torch_dtype.
        write_json(staging / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})
        write_text(staging / "README.md", model_card(manifest, shape, dtype))
    return Written(out, sum(len(piece.hf) for piece in pieces), total, dtype, time.monotonic() - started)


def _check(checkpoint: Checkpoint, manifest: dict, shape: ModelShape, pieces: list[llama.Piece]) -> None:
    """Raise InputError unless the checkpoint's tensors are those of the model in its hf/config.json."""
    config = f"{checkpoint.directory / layout.HF_DIRECTORY}/config.json"
    if manifest["vocab_size"] != shape.vocab_size:
        raise InputError(
            f"{config}: vocab_size={shape.vocab_size}, but the checkpoint was written for {manifest['vocab_size']}; "
            "is it the config of another model?"
        )
    for piece in pieces:
        stored = checkpoint.shape(piece.key)
        if stored is None:
            raise InputError(f"{checkpoint.directory}: tensor {piece.key} is missing; does {config} belong to it?")
        # Only a vocabulary may be larger than the model's, by its padding.
        padded = piece.key in llama.PADDED and stored[1:] == piece.global_shape[1:]
        if stored != piece.global_shape and not (padded and stored[0] >= piece.global_shape[0]):
            raise InputError(
                f"{checkpoint.directory}: {piece.key} has shape {list(stored)}, but {config} says "
                f"{list(piece.global_shape)}; is it a checkpoint of another model?"
            )
    if shape.tied_embeddings and checkpoint.shape(llama.OUTPUT):
        raise InputError(f"{checkpoint.directory}: holds {llama.OUTPUT}, but {config} says tie_word_embeddings=true")


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500 MB", "2GiB" or a plain number.  Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = int(float(match.group(1)) * _UNITS.get(match.group(2).upper(), 0)) if match else 0
    if size <= 0:
        raise InputError(f"--max-shard-size {text}: not a size; write it like 5GB or 500MB")
    return size
