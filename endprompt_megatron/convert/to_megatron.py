"""Hugging Face directory -> Megatron-Core checkpoint that a model of any parallel layout can load."""

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt_megatron.checkpoint import layout, shard_files
from endprompt_megatron.checkpoint.tensor_reader import Scratch
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import checksums_of, refuse_existing
from endprompt_megatron.common.units import format_bytes
from endprompt_megatron.common.workers import mpi, ranks_agree
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.direct import HfSource
from endprompt_megatron.convert.work_units import identity, write_units
from endprompt_megatron.model.shape import ModelShape, read_shape
from endprompt_megatron.tokenizer.vocabulary import check_vocabulary

_SHARD_BYTES = 64 << 20
_FILE_BYTES = 512 << 20


@dataclass(frozen=True)
class Written:
    """What a conversion wrote: where, how many tensors and bytes of weights, their dtype, and the seconds it took."""

    path: Path
    tensors: int
    bytes: int
    dtype: str
    seconds: float

    def __str__(self) -> str:
        size = format_bytes(self.bytes)
        return f"wrote {self.path}: {self.tensors} tensors, {size}, {self.dtype}, {self.seconds:.1f} s"


def convert_hf_to_megatron(hf: Path, out: Path, dtype: str | None = None, workers: int | None = 1) -> Written | None:
    """Convert the weights in `hf` and write iteration 0 of a new checkpoint directory `out`.

    `dtype` ("bfloat16", "float16", "float32") casts; None keeps the weights to the bit.  `workers` processes write
    (None: one a CPU, at most 8); under mpirun or srun every rank is one, and all must call: None comes back on those
    past the first.  Everything is checked before anything is written, and `out` appears when it is complete.  After a
    kill, the same call continues.  Raises InputError.
    """
    started = time.monotonic()
    hf, out = Path(hf), Path(out)
    comm = mpi()
    with ranks_agree(comm):
        shape = read_shape(hf)
        refuse_existing(out, "--out")
        check_vocabulary(hf, shape.vocab_size)
        dtype = layout.parse_dtype(dtype)
        found = HfSource(hf).dtypes
        if dtype is None and len(found) > 1:
            examples = ", ".join(f"{tensor} {name}" for name, tensor in sorted(found.items()))
            raise InputError(f"{hf}: tensors of several dtypes ({examples}); choose one with --dtype")
        dtype = dtype or next(iter(found))
        shards = list(_planned(shape, getattr(torch, dtype).itemsize))
        total = sum(shard.bytes for shard in shards)
        layout.require_space(out, total, "--out")
    files = _in_files(shards)

    def finish(staging: Path, reports: list[dict]) -> None:
        from endprompt_megatron.checkpoint import torch_dist  # a second's import that workers do without

        directory = layout.iteration_dir(staging, 0)
        _keep_only(directory, {report["file"] for report in reports})
        torch_dist.describe(directory, reports, {})
        layout.copy_hf_files(hf, directory / layout.HF_DIRECTORY)
        layout.write_manifest(
            directory,
            step=0,
            consumed_samples=0,
            recipe=None,
            vocab_size=shape.vocab_size,
            dtype=dtype,
            source=hf.resolve().name,
            files=checksums_of(directory, reports),
        )
        layout.write_latest(staging, 0)

    job = {"to": "megatron", "dtype": dtype, "from": str(hf.resolve()), "files": identity(hf)}
    start = functools.partial(_start, hf, dtype, files)
    write_units(out, job, [sum(shard.bytes for shard in shards) for shards in files], start, finish, workers, comm)
    if comm and comm.rank:
        return None
    tensors = sum(len(mapped.hf) for mapped in mapping.mapped_tensors(shape))
    return Written(out, tensors, total, dtype, time.monotonic() - started)


def _keep_only(directory: Path, names: set[str]) -> None:
    """Remove what an earlier start that was killed while it finished left beside the data files."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


@dataclass(frozen=True)
class _PlannedShard:
    """A slice of a Megatron tensor that is read, joined and written at once."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    bytes: int


def _planned(shape: ModelShape, size: int) -> Iterator[_PlannedShard]:
    """The model in shards of at most _SHARD_BYTES, of `size` bytes an element: memory does not grow with the model."""
    for mapped in mapping.mapped_tensors(shape):
        axis = 1 if mapped.per_layer else 0
        row_bytes = math.prod(mapped.shape[axis + 1 :]) * size
        step = max(1, _SHARD_BYTES // row_bytes)
        for begin in range(0, mapped.rows, step):
            count = min(step, mapped.rows - begin)
            offset = (*mapped.offset[:axis], mapped.offset[axis] + begin, *mapped.offset[axis + 1 :])
            sizes = (*mapped.shape[:axis], count, *mapped.shape[axis + 1 :])
            yield _PlannedShard(mapped.key, mapped.global_shape, offset, sizes, count * row_bytes)


def _in_files(shards: list[_PlannedShard]) -> list[list[_PlannedShard]]:
    """Shards that follow each other, in files of about _FILE_BYTES."""
    files, held = [[]], 0
    for shard in shards:
        if held + shard.bytes > _FILE_BYTES and files[-1]:
            files.append([])
            held = 0
        files[-1].append(shard)
        held += shard.bytes
    return files


def _start(hf: Path, dtype: str, files: list[list[_PlannedShard]], staging: Path) -> Callable[[int], dict]:
    """What a worker needs to write a file, made once in each."""
    source, scratch, torch_dtype = HfSource(hf, once=True), Scratch(), getattr(torch, dtype)
    directory = layout.iteration_dir(staging, 0)
    directory.mkdir(exist_ok=True)

    def load(shard: _PlannedShard) -> torch.Tensor:
        return source.read(
            shard.key, shard.offset, shard.shape, torch_dtype, into=scratch.tensor(shard.shape, torch_dtype)
        )

    def write(number: int) -> dict:
        stored = (
            shard_files.Shard(
                shard.key, shard.global_shape, shard.offset, shard.shape, torch_dtype, functools.partial(load, shard)
            )
            for shard in files[number]
        )
        objects = dict.fromkeys(_extra_states(read_shape(hf))) if number == 0 else {}
        name = f"__{number}_0.distcp"
        return {**shard_files.write_file(directory, name, stored, objects), "path": f"{directory.name}/{name}"}

    return write


def _extra_states(shape: ModelShape) -> list[str]:
    """Megatron's keys of the (empty) extra states: ShardedObjects, one a layer."""
    keys = []
    for key in mapping.extra_states(shape):
        count = shape.num_layers if key.startswith(mapping.LAYERS) else 1
        keys += [f"{key}/shard_{index}_{count}" for index in range(count)]
    return keys
