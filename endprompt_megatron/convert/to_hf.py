"""Megatron-Core checkpoint, of any parallel layout -> Hugging Face directory that transformers and vLLM load."""

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.checkpoint.tensor_reader import Scratch, refuse_overflow
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, refuse_existing, write_json, write_text
from endprompt_megatron.common.workers import mpi, ranks_agree
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.hf_writing import (
    FileChunk,
    chunks_of,
    files_of,
    one_chunk,
    write_chunk,
    write_index,
)
from endprompt_megatron.convert.lora_merge import merge_of
from endprompt_megatron.convert.model_card import model_card
from endprompt_megatron.convert.over_base import checkpoint_at
from endprompt_megatron.convert.to_megatron import Written
from endprompt_megatron.convert.work_units import identity, write_units
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
    base: Path | None = None,
) -> Written | None:
    """Export a checkpoint: weights, config, generation config, tokenizer files and a model card.

    `megatron` is a checkpoint directory (its newest complete iteration, or `iteration`) or one iter_ directory.
    `dtype` None writes what the manifest says.  The padding of the vocabulary is cut, optimizer state is not read;
    LoRA's adapters are merged into the matrices, in float32, before they are cast.  `base`: where the frozen weights
    have moved to, of a checkpoint without them.
    `workers` processes write a file each (None: one a CPU, at most 8); under mpirun or srun every rank is one, and
    all must call: None comes back on those past the first.  Everything is checked before anything is written, and
    `out` appears when it is complete.  After a kill, the same call continues.  Raises InputError.
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
        mapped = list(mapping.mapped_tensors(shape))
        checkpoint = checkpoint_at(source, base)
        _check(checkpoint, manifest, shape, mapped)
        merge_of(checkpoint, shape)
        dtype = layout.parse_dtype(dtype) or manifest["dtype"]
        files = files_of(mapped, dtype, limit)
        total = sum(file.bytes for file in files)
        # Hosts that share a file system write complete files: not all of them let several hosts write one.
        chunks = [chunk for file in files for chunk in ([one_chunk(file)] if comm else chunks_of(file))]
        layout.require_space(out, total, "--out")

    def finish(staging: Path, _: list[dict]) -> None:
        if len(files) > 1:
            write_index(staging, files, dtype)
        layout.copy_hf_files(hf, staging)
        # transformers 5 reads dtype; transformers 4 and vLLM read torch_dtype.
        write_json(staging / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})
        write_text(staging / "README.md", model_card(manifest, shape, dtype))

    job = {
        "to": "hf",
        "dtype": dtype,
        "shard": limit,
        "parts": len(chunks),
        "from": str(source.resolve()),
        "files": [*identity(source), *identity(hf)],
    }
    start = functools.partial(_start, source, dtype, chunks, base)
    write_units(out, job, [chunk.bytes for chunk in chunks], start, finish, workers, comm)
    if comm and comm.rank:
        return None
    return Written(out, sum(len(tensor.hf) for tensor in mapped), total, dtype, time.monotonic() - started)


def _start(
    source: Path, dtype: str, chunks: list[FileChunk], base: Path | None, staging: Path
) -> Callable[[int], dict]:
    """What a worker needs to write a chunk of a file, made once in each."""
    weights = MegatronWeights(source, getattr(torch, dtype), base)
    return lambda number: write_chunk(staging, chunks[number], dtype, weights.rows)


class MegatronWeights:
    """Hugging Face's tensors of a Megatron checkpoint, a few rows at a time: used before the next are read.

    LoRA's adapters are merged into them.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, base: Path | None = None):
        self.checkpoint, self.dtype, self.scratch = checkpoint_at(directory, base, once=True), dtype, Scratch()
        shape = read_shape(directory / layout.HF_DIRECTORY)
        self.merge = merge_of(self.checkpoint, shape)
        self.places = {
            name: (mapped, number)
            for mapped in mapping.mapped_tensors(shape)
            for number, (name, _) in enumerate(mapped.hf)
        }
        self._split: tuple[mapping.MappedTensor, list[torch.Tensor]] | None = None

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor `name`, some rows at a time, as many as are stored together.  Raises InputError."""
        mapped, index = self.places[name]
        merged = self.merge is not None and self.merge.changes(name)
        dtype = torch.float32 if merged else self.dtype
        if mapped.groups:
            # Queries, keys and values lie in between each other, and follow each other where they are written.
            if self._split is None or self._split[0] != mapped:
                self._split = None  # before the next is read
                value = self._read(mapped, mapped.offset, mapped.shape, dtype)
                self._split = mapped, mapping.split(mapped, value)
            tensor = self._split[1][index]
            # A copy: what is kept is asked for again.
            yield self._cast(self.merge.add_to(tensor.clone(), name), name) if merged else tensor
            return
        axis = 1 if mapped.per_layer else 0
        cuts = self.checkpoint.row_cuts(mapped.key, mapped.offset, mapped.shape, axis)
        for begin, end in itertools.pairwise(cuts):
            offset = (*mapped.offset[:axis], begin, *mapped.offset[axis + 1 :])
            shape = (*mapped.shape[:axis], end - begin, *mapped.shape[axis + 1 :])
            rows = self._read(mapped, offset, shape, dtype, into=self.scratch.tensor(shape, dtype))
            if merged:
                added = self.merge.add_to(rows.reshape(-1, shape[-1]), name, begin - mapped.offset[axis])
                rows = self._cast(added.view_as(rows), name)
            yield rows

    def _read(
        self, mapped: mapping.MappedTensor, offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, **into
    ) -> torch.Tensor:
        value = self.checkpoint.read(mapped.key, offset, shape, dtype, **into)
        stored = self.checkpoint.dtype(mapped.key)
        where = f"{self.checkpoint.directory}: {mapped.key}"
        refuse_overflow(value, stored, lambda: self.checkpoint.read(mapped.key, offset, shape, stored), where)
        return value

    def _cast(self, merged: torch.Tensor, name: str) -> torch.Tensor:
        """A weight with adapters merged into it, float32, in the dtype of the export."""
        cast = merged.to(self.dtype)
        refuse_overflow(cast, merged.dtype, lambda: merged, f"{self.checkpoint.directory}: {name} with its adapters")
        return cast


def _check(checkpoint: Checkpoint, manifest: dict, shape: ModelShape, mapped: list[mapping.MappedTensor]) -> None:
    """Raise InputError unless the checkpoint's tensors are those of the model in its hf/config.json."""
    config = f"{checkpoint.directory / layout.HF_DIRECTORY}/config.json"
    if manifest["vocab_size"] != shape.vocab_size:
        raise InputError(
            f"{config}: vocab_size={shape.vocab_size}, but the checkpoint was written for {manifest['vocab_size']}; "
            "is it the config of another model?"
        )
    for tensor in mapped:
        stored = checkpoint.shape(tensor.key)
        if stored is None:
            raise InputError(f"{checkpoint.directory}: tensor {tensor.key} is missing; does {config} belong to it?")
        # Only a vocabulary may be larger than the model's, by its padding.
        padded = tensor.key in mapping.PADDED and stored[1:] == tensor.global_shape[1:]
        if stored != tensor.global_shape and not (padded and stored[0] >= tensor.global_shape[0]):
            raise InputError(
                f"{checkpoint.directory}: {tensor.key} has shape {list(stored)}, but {config} says "
                f"{list(tensor.global_shape)}; is it a checkpoint of another model?"
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
