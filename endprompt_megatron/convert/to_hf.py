"""Megatron-Core checkpoint, of any parallel layout -> Hugging Face directory that transformers and vLLM load."""

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.checkpoint.tensor_reader import Scratch
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, refuse_existing, write_json, write_text
from endprompt_megatron.common.workers import mpi, ranks_agree
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.hf_weights import (
    Part,
    parts_of,
    shards_of,
    whole,
    write_index,
    write_part,
)
from endprompt_megatron.convert.lora_merge import merge_of
from endprompt_megatron.convert.model_card import model_card
from endprompt_megatron.convert.to_megatron import Written
from endprompt_megatron.convert.units import identity, write_units
from endprompt_megatron.model.shape import ModelShape, read_shape, shape_of
from endprompt_megatron.tokenizer.vocabulary import check_vocabulary

DEFAULT_SHARD = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert_megatron_to_hf(
    megatron: Path,
    out: Path,
    iteration: int | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str = DEFAULT_SHARD,
    workers: int | None = 1,
) -> Written | None:
    """Export a checkpoint: weights, config, generation config, tokenizer files and a model card.

    `megatron` is a checkpoint directory (its newest complete iteration, or `iteration`) or one iter_ directory.
    `dtype` None writes what the manifest says.  The padding of the vocabulary is cut, optimizer state is not read;
    LoRA's adapters are merged into the matrices, in float32, before they are cast.
    `workers` processes write a file each (None: one a CPU, at most 8); under mpirun or srun every rank is one, and
    all must call: None comes back on those past the first.  Everything is checked before anything is written, and
    `out` appears when it is whole.  Killed and called again, it goes on.  Raises InputError.
    """
    started = time.monotonic()
    out, comm = Path(out), mpi()
    with ranks_agree(comm):
        source = layout.find_checkpoint(Path(megatron), iteration)
        manifest = layout.read_manifest(source)
        hf = source / layout.HF_DIRECTORY
        config = read_json(hf / "config.json", "a Hugging Face config")
        shape = shape_of(config, str(hf / "config.json"))
        limit = parse_size(max_shard_size)
        refuse_existing(out, "--out")
        check_vocabulary(hf, shape.vocab_size)
        pieces = list(mapping.pieces(shape))
        checkpoint = Checkpoint(source)
        _check(checkpoint, manifest, shape, pieces)
        merge_of(checkpoint)
        dtype = layout.parse_dtype(dtype) or manifest["dtype"]
        shards = shards_of(pieces, dtype, limit)
        total = sum(shard.bytes for shard in shards)
        # Hosts that share a file system write whole files: not all of them let several hosts write one.
        parts = [part for shard in shards for part in ([whole(shard)] if comm else parts_of(shard))]
        layout.require_space(out, total, "--out")

    def finish(staging: Path, _: list[dict]) -> None:
        if len(shards) > 1:
            write_index(staging, shards, dtype)
        layout.copy_hf_files(hf, staging)
        # transformers 5 reads dtype; transformers 4 and vLLM read torch_dtype.
        write_json(staging / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})
        write_text(staging / "README.md", model_card(manifest, shape, dtype))

    job = {
        "to": "hf",
        "dtype": dtype,
        "shard": limit,
        "parts": len(parts),
        "from": str(source.resolve()),
        "files": [*identity(source), *identity(hf)],
    }
    start = functools.partial(_start, source, dtype, parts)
    write_units(out, job, [part.bytes for part in parts], start, finish, workers, comm)
    if comm and comm.rank:
        return None
    return Written(out, sum(len(piece.hf) for piece in pieces), total, dtype, time.monotonic() - started)


def _start(source: Path, dtype: str, parts: list[Part], staging: Path) -> Callable[[int], dict]:
    """What a worker needs to write a part of a file, made once in each."""
    weights = MegatronWeights(source, getattr(torch, dtype))
    return lambda number: write_part(staging, parts[number], dtype, weights.rows)


class MegatronWeights:
    """Hugging Face's tensors of a Megatron checkpoint, a few rows at a time: used before the next are read.

    LoRA's adapters are merged into them.
    """

    def __init__(self, directory: Path, dtype: torch.dtype):
        self.checkpoint, self.dtype, self.scratch = Checkpoint(directory, once=True), dtype, Scratch()
        self.merge = merge_of(self.checkpoint)
        shape = read_shape(directory / layout.HF_DIRECTORY)
        self.places = {name: (piece, n) for piece in mapping.pieces(shape) for n, (name, _) in enumerate(piece.hf)}
        self._joined: tuple[mapping.Piece, list[torch.Tensor]] | None = None

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor `name` in parts along its first axis, as large as they are stored.  Raises InputError."""
        piece, index = self.places[name]
        merged = self.merge is not None and self.merge.changes(name)
        dtype = torch.float32 if merged else self.dtype
        if piece.groups:
            # Queries, keys and values lie in between each other, and follow each other where they are written.
            if self._joined is None or self._joined[0] != piece:
                self._joined = None  # before the next is read
                value = self.checkpoint.read(piece.key, piece.offset, piece.shape, dtype)
                self._joined = piece, mapping.split(piece, value)
            part = self._joined[1][index]
            # A copy: what is kept is asked for again.
            yield self.merge.add_to(part.clone(), name).to(self.dtype) if merged else part
            return
        axis = 1 if piece.per_layer else 0
        cuts = self.checkpoint.row_cuts(piece.key, piece.offset, piece.shape, axis)
        for begin, end in itertools.pairwise(cuts):
            offset = (*piece.offset[:axis], begin, *piece.offset[axis + 1 :])
            shape = (*piece.shape[:axis], end - begin, *piece.shape[axis + 1 :])
            part = self.checkpoint.read(piece.key, offset, shape, dtype, into=self.scratch.tensor(shape, dtype))
            if merged:
                rows = self.merge.add_to(part.reshape(-1, shape[-1]), name, begin)
                part = rows.view_as(part).to(self.dtype)
            yield part


def _check(checkpoint: Checkpoint, manifest: dict, shape: ModelShape, pieces: list[mapping.Piece]) -> None:
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
        padded = piece.key in mapping.PADDED and stored[1:] == piece.global_shape[1:]
        if stored != piece.global_shape and not (padded and stored[0] >= piece.global_shape[0]):
            raise InputError(
                f"{checkpoint.directory}: {piece.key} has shape {list(stored)}, but {config} says "
                f"{list(piece.global_shape)}; is it a checkpoint of another model?"
            )
    if shape.tied_embeddings and checkpoint.shape(mapping.OUTPUT):
        raise InputError(f"{checkpoint.directory}: holds {mapping.OUTPUT}, but {config} says tie_word_embeddings=true")


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500 MB", "2GiB" or a plain number.  Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = int(float(match.group(1)) * _UNITS.get(match.group(2).upper(), 0)) if match else 0
    if size <= 0:
        raise InputError(f"--max-shard-size {text}: not a size; write it like 5GB or 500MB")
    return size
