"""Do a Hugging Face directory and a Megatron checkpoint hold the same weights?  Tensor by tensor.

By CRC-32 where both sides have one dtype.  Where one was cast, every number is compared with its source: it must be
no farther away than rounding to the other dtype takes it.

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
    cast: str | None = None  # the dtype that one side was cast to

    def __str__(self) -> str:
        compared = f"{self.tensors} tensors, {format_bytes(self.bytes)}, {self.seconds:.1f} s"
        how = f"every number is its source's, rounded to {self.cast}" if self.cast else "every CRC-32 is the same"
        return f"verified {self.megatron} against {self.hf}: {compared}; {how}"


def verify(
    hf: Path,
    megatron: Path,
    iteration: int | None = None,
    *,
    to_hf: bool,
    workers: int | None = 1,
    base: Path | None = None,
) -> Verified:
    """Compare every tensor of `hf` with its counterpart in `megatron`; memory is that of a few slices of tensors.

    `to_hf`: Megatron's side is the source that was converted from.  `base`: as in convert_megatron_to_hf.  Raises
    InputError if one is not complete, or naming the tensors that differ.
    """
    started = time.monotonic()
    source = layout.find_checkpoint(Path(megatron), iteration)
    shape = read_shape(hf)
    layout.refuse_other_model(read_shape(source / layout.HF_DIRECTORY), shape, str(source), str(hf))
    dtypes = HfSource(Path(hf)).dtypes
    written = next(iter(dtypes)) if to_hf else layout.read_manifest(source)["dtype"]
    mapped = list(mapping.mapped_tensors(shape))
    sizes = [tensor.elements * getattr(torch, written).itemsize for tensor in mapped]
    workers = number_of(workers, None, MAX_WORKERS)
    start = functools.partial(_start, Path(hf), source, to_hf, base)
    with Progress("verifying", sum(sizes)) as progress:
        found = for_each(start, sizes, workers, progress.add, fork=True)
    wrong = [line for lines, _ in found for line in lines]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{source} and {hf} differ: {'; '.join(wrong[:3])}{more}; convert again")
    cast = written if any(was_cast for _, was_cast in found) else None
    tensors = sum(len(tensor.hf) for tensor in mapped)
    return Verified(Path(hf), source, tensors, sum(sizes), time.monotonic() - started, cast)


def _start(hf: Path, megatron: Path, to_hf: bool, base: Path | None) -> Callable[[int], tuple[list[str], bool]]:
    """What compares the weights of a mapped tensor, made once in every worker.

    It gives a line for each that differs, and whether the two sides have different dtypes.
    """
    left, mapped = HfSource(hf).weights, list(mapping.mapped_tensors(read_shape(hf)))
    readers: dict[torch.dtype, MegatronWeights] = {}

    def compare(number: int) -> tuple[list[str], bool]:
        wrong, cast = [], False
        for name, sizes in mapped[number].hf:
            ours = left.dtype(name)
            theirs = _as_stored(megatron, base, readers, mapped[number].key, name)
            step = max(1, _BLOCK // (ours.itemsize * (sizes[1] if len(sizes) > 1 else 1)))
            rows = (left.read_slice(name, (slice(at, at + step),)) for at in range(0, sizes[0], step))
            if ours == theirs.dtype:
                both = _crc32(rows), _crc32(theirs.rows(name))
                if both[0] != both[1]:
                    wrong.append(
                        f"{name} has CRC-32 {both[0]:08x} in Hugging Face's files and {both[1]:08x} in Megatron's"
                    )
                continue
            cast = True
            far = begin = 0
            for part in theirs.rows(name):
                block = part.reshape(-1, *sizes[1:])
                other = left.read_slice(name, (slice(begin, begin + len(block)),))
                far += _farther_than_rounding(*((block, other) if to_hf else (other, block)))
                begin += len(block)
            if far or begin != sizes[0]:
                dtype = str(ours if to_hf else theirs.dtype).removeprefix("torch.")
                wrong.append(f"{name} has {far} numbers that are not its source's, rounded to {dtype}")
        return wrong, cast

    return compare


def _as_stored(
    megatron: Path, base: Path | None, readers: dict[torch.dtype, MegatronWeights], key: str, name: str
) -> MegatronWeights:
    """A reader of the Megatron weight `key` in the dtype that it has there; with adapters in it, in float32."""
    any_reader = next(iter(readers.values()), None) or readers.setdefault(
        torch.float32, MegatronWeights(megatron, torch.float32, base)
    )
    merged = any_reader.merge is not None and any_reader.merge.changes(name)
    dtype = torch.float32 if merged else any_reader.checkpoint.dtype(key)
    if dtype not in readers:
        readers[dtype] = MegatronWeights(megatron, dtype, base)
    return readers[dtype]


def _farther_than_rounding(source: torch.Tensor, result: torch.Tensor) -> int:
    """How many numbers of `result` are not those of `source`, to within half a unit of their last place."""
    limits = torch.finfo(result.dtype)
    exact, ours = source.double(), result.double()
    # Half of the smallest number too, below which nothing is represented.
    near = (ours - exact).abs() <= limits.eps / 2 * exact.abs() + limits.smallest_normal * limits.eps / 2
    return int((~(near | (exact == ours) | (exact.isnan() & ours.isnan()))).sum())


def _crc32(blocks: Iterator[torch.Tensor]) -> int:
    value = 0
    for block in blocks:
        value = add_crc32(block.contiguous().view(torch.uint8).numpy().reshape(-1).data, value)
    return value
