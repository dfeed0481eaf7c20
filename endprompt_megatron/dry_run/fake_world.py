"""Process groups that send nothing and tensors that hold nothing, and a ledger of what a rank does with them.

`FakeTensorMode` gives every operation's result its shape and dtype without computing it; torch's `fake` backend makes
groups of any number of ranks in one process.  The ledger sees every operation on its way.
"""

import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Collectives of several tensors at once, which torch's fake_collectives leaves out.
_COALESCED = ("allgather_into_tensor", "reduce_scatter_tensor", "allreduce", "allgather")
_PEERS = {"send": "to", "recv": "from"}
_KINDS = {"item": float, "__float__": float, "__int__": int, "__bool__": bool, "tolist": list}
_library: Any = None


def enter(rank: int, world_size: int) -> None:
    """Make this process rank `rank` of `world_size`, for the rest of its life: of groups that answer at once."""
    global _library
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % 8))
    _library = torch.library.Library("c10d", "IMPL")
    for name in _COALESCED:
        _answer_at_once(_library, getattr(torch.ops.c10d, f"{name}_coalesced_").default)
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    def all_gather_object(found: list, value: object, group: Any = None) -> None:
        found[:] = [value] * len(found)

    dist.new_group, dist.all_gather_object = fake_group, all_gather_object
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _answer_at_once(library: torch.library.Library, operation: Any) -> None:
    with_tensors = str(operation._schema).split("->")[1].strip().startswith("(")

    def answer(first: Any, *_: Any, **__: Any) -> Any:
        work = FakeWork().boxed()
        return (first, work) if with_tensors else work

    library.impl(operation, answer, "Meta")


class Ledger(TorchDispatchMode):
    """Bytes that live, FLOPs of matrix products, collectives by group: of all that happens inside.

    `names`: of groups, by torch's name of a group.  `curve`: (FLOPs so far, the most bytes that lived then).
    """

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names
        self.live = self.peak = self.flops = 0
        self.count: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.curve: list[tuple[int, int]] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().partition("::")
        if name[0] == "c10d":
            self._note_traffic(name[2].partition(".")[0], args)
        elif func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif func is torch.ops.aten.addmm.default:
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, FakeTensor):
                self._note_storage(value.untyped_storage())
        return found

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        if self.curve and self.curve[-1][0] == self.flops:
            self.curve[-1] = self.flops, max(self.curve[-1][1], self.live)
        else:
            self.curve.append((self.flops, self.live))
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)

    def _note_traffic(self, operation: str, args: tuple) -> None:
        tensors = [value.numel() * value.element_size() for value in tree_iter(args) if isinstance(value, torch.Tensor)]
        (group,) = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        name = dist.ProcessGroup.unbox(group).group_name
        operation = operation.strip("_")
        if operation in _PEERS:
            operation += f" {_PEERS[operation]} {args[2]}"  # a rank of the group
        key = operation, self.names.get(name, name)
        self.count[key] += 1
        self.bytes[key] += max(tensors, default=0)


@contextmanager
def counted_syncs(inside: str) -> Iterator[Counter[tuple[str, str]]]:
    """Values that are read from fake tensors, which are 1: on a GPU each would wait for it.  By kind and line.

    Lines are those of Megatron-Core and of files under `inside`.
    """
    seen: Counter[tuple[str, str]] = Counter()
    real = {name: getattr(torch.Tensor, name) for name in _KINDS}

    def reading(name: str, kind: type) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, FakeTensor):
                return real[name](self, *args, **kwargs)
            seen[name.strip("_"), _line(inside)] += 1
            return [1.0] * self.numel() if kind is list else kind(1)

        return read

    for name, kind in _KINDS.items():
        setattr(torch.Tensor, name, reading(name, kind))
    try:
        yield seen
    finally:
        for name, function in real.items():
            setattr(torch.Tensor, name, function)


def _line(inside: str) -> str:
    """Of the innermost frame that is Megatron-Core's or under `inside`, and not this file's."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and path.startswith(inside):
            return f"{path.removeprefix(inside).lstrip('/')}:{frame.f_lineno}"
        if "/megatron/core/" in path:
            return f"megatron/core/{path.partition('/megatron/core/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
