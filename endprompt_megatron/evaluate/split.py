"""Which process asks what, if several evaluate together: tasks of a Slurm array, ranks of srun, torchrun or mpirun.

Request i belongs to part i modulo the number of parts, so that long and short inputs are spread over all parts.  Parts
share nothing but the directory of responses; only the ranks of one Megatron model (TP, PP) ask the same together.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from endprompt_megatron.common.errors import InputError


@dataclass(frozen=True)
class Part:
    """This process's share, `index` of 0..count-1."""

    index: int = 0
    count: int = 1

    def has(self, place: int) -> bool:
        return place % self.count == self.index

    def split(self, rank: int, ranks: int) -> "Part":
        """The share of one of `ranks` processes that do this part together."""
        return Part(self.index * ranks + rank, self.count * ranks)

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


def parse_part(text: str | None, environment: Mapping[str, str] = os.environ) -> Part:
    """--part I/N, I from 0; "array": this task of a Slurm array; None: all of it.  Raises InputError."""
    if text is None:
        return Part()
    if text == "array":
        return _array(environment)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise InputError(f"--part {text}: should be I/N with I from 0 to N-1, such as 0/4, or array under Slurm")
    return Part(int(found[1]), int(found[2]))


def _array(environment: Mapping[str, str]) -> Part:
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    try:
        task, first, last, count = (int(environment[name]) for name in names)
    except (KeyError, ValueError):
        raise InputError(f"--part array: {names[0]} is not set; submit with sbatch --array=0-3, or give I/N") from None
    if last - first + 1 != count:
        raise InputError(
            f"--part array: the array's {count} tasks are not numbered one by one; use --array=0-{count - 1}"
        )
    return Part(task - first, count)


class Alone:
    """A process that holds a whole model: it asks its part and writes the responses."""

    leads = True  # of the ranks that ask the same, the one that writes
    first = True  # the rank that puts the results together
    together = False  # whether ranks load a model together

    def __init__(self, part: Part) -> None:
        self.part = part

    def agree(self, value: Any) -> Any:
        """The leader's value, on all ranks that hold one model together."""
        return value

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on all ranks that load models together."""
        return flag

    def same_errors(self) -> contextlib.AbstractContextManager[None]:
        """An InputError inside, on any rank that loads models together, is one on all of them."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Return when all ranks have called this."""


class ModelRanks:
    """A rank of Megatron's process groups: TP x PP ranks hold a model, data-parallel ones split the work."""

    together = True

    def __init__(self, part: Part) -> None:
        import torch.distributed as dist
        from megatron.core import parallel_state

        self.part = part.split(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())
        self.group = parallel_state.get_model_parallel_group()
        self.source = dist.get_process_group_ranks(self.group)[0]
        self.leads, self.first = dist.get_rank() == self.source, dist.get_rank() == 0

    def agree(self, value: Any) -> Any:
        """See Alone."""
        import torch.distributed as dist

        from endprompt_megatron.distributed.runtime import device

        held = [value]
        dist.broadcast_object_list(held, src=self.source, group=self.group, device=device())
        return held[0]

    def all(self, flag: bool) -> bool:
        """See Alone."""
        import torch.distributed as dist

        held = [False] * dist.get_world_size()
        dist.all_gather_object(held, flag)
        return all(held)

    def same_errors(self) -> contextlib.AbstractContextManager[None]:
        """See Alone."""
        from endprompt_megatron.distributed.runtime import raise_on_all_ranks

        return raise_on_all_ranks()

    def wait(self) -> None:
        """See Alone."""
        import torch.distributed as dist

        dist.barrier()
