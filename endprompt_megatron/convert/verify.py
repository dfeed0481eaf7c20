"""Do a Hugging Face directory and a Megatron checkpoint hold the same weights?  Tensor by tensor, by CRC-32.

The Megatron side is taken apart by mapping.split, where conversion puts it together by mapping.spans: two ways to read
the one table, so that a mistake in either is seen.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.common.direct_io import add_crc32
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.progress import Progress
from endprompt_megatron.common.units import format_bytes
from endprompt_megatron.common.workers import for_each, number_of
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.direct import HfSource
from endprompt_megatron.convert.to_hf import MegatronWeights
from endprompt_megatron.convert.work_units import MAX_WORKERS
from endprompt_megatron.model.shape import read_shape

_BLOCK = 64 << 20


@dataclass(frozen=True)
class Verified:
    """What was compared, all of it found the same."""

    hf: Path
    megatron: Path
    tensors: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        compared = f"{self.tensors} tensors, {format_bytes(self.bytes)}, {self.seconds:.1f} s"
        return f"verified {self.megatron} against {self.hf}: {compared}; every CRC-32 is the same"


def verify(hf: Path, megatron: Path, iteration: int | None = None, *, to_hf: bool, workers: int | None = 1) -> Verified:
    """Compare every tensor of `hf` with its counterpart in `megatron`; memory is that of a few slices of tensors.

    Where dtypes differ, the side that was converted from is cast as the conversion casts it: Megatron's if `to_hf`.
    Raises InputError if one is not complete, or naming the tensors that differ.
    """
    started = time.monotonic()
    source = layout.find_checkpoint(Path(megatron), iteration)
    shape = read_shape(hf)
    layout.refuse_other_model(read_shape(source / layout.HF_DIRECTORY), shape, str(source), str(hf))
    dtypes = HfSource(Path(hf)).dtypes
    dtype = layout.read_manifest(source)["dtype"] if not to_hf else next(iter(dtypes))
    mapped = list(mapping.mapped_tensors(shape))
    sizes = [tensor.elements * getattr(torch, dtype).itemsize for tensor in mapped]
    workers = number_of(workers, None, MAX_WORKERS)
    start = functools.partial(_start, Path(hf), source, dtype)
    with Progress("verifying", sum(sizes)) as progress:
        found = for_each(start, sizes, workers, progress.add, fork=True)
    wrong = [line for lines in found for line in lines]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{source} and {hf} differ: {'; '.join(wrong[:3])}{more}; convert again")
    return Verified(Path(hf), source, sum(len(tensor.hf) for tensor in mapped), sum(sizes), time.monotonic() - started)


def _start(hf: Path, megatron: Path, dtype: str) -> Callable[[int], list[str]]:
    """What compares the weights of a mapped tensor, made once in every worker; gives a line for each that differs."""
    torch_dtype = getattr(torch, dtype)
    left, right = HfSource(hf).weights, MegatronWeights(megatron, torch_dtype)
    mapped = list(mapping.mapped_tensors(read_shape(hf)))

    def compare(number: int) -> list[str]:
        wrong = []
        for name, sizes in mapped[number].hf:
            step = max(1, _BLOCK // (torch_dtype.itemsize * (sizes[1] if len(sizes) > 1 else 1)))
            blocks = (left.read_slice(name, (slice(at, at + step),)).to(torch_dtype) for at in range(0, sizes[0], step))
            ours, theirs = _crc32(blocks), _crc32(right.rows(name))
            if ours != theirs:
                wrong.append(f"{name} has CRC-32 {ours:08x} in Hugging Face's files and {theirs:08x} in Megatron's")
        return wrong

    return compare


def _crc32(blocks: Iterator[torch.Tensor]) -> int:
    value = 0
    for block in blocks:
        value = add_crc32(block.contiguous().view(torch.uint8).numpy().reshape(-1).data, value)
    return value
