"""The optimizer's state in a checkpoint: master weights and moments, by their parameters' global shapes.

The distributed optimizer gives each data-parallel rank ranges of the flattened parameters.  Each rank
stores, and reads, the shards that make up its own ranges (weights.shards_of_range): no rank gathers another's
state, all of them write at once, and any layout finds its ranges among the stored shards.  Names and shapes
are those of Megatron's `fully_reshardable` form; that form itself gathers everything into buffers first.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from endprompt_megatron.checkpoint.shard_files import Shard
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.checkpoint.weights import Weight, shards_of_range
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.distributed.runtime import device


def stored_state(optimizer: ChainedOptimizer, weights: list[Weight]) -> list[Shard]:
    """This rank's state, to be written.  Tensors are fetched one at a time, when they are written or staged."""
    _allocate(optimizer)
    places = _places(weights)
    found = []
    for member, parameter, start, end in _owned(optimizer):
        for name, value in _states(member, parameter).items():
            state = partial(_flat_state, member, parameter, name)
            for place in places[parameter]:
                if place.first:
                    found += _stored_shards(place, name, value.dtype, start, end, state)
    return found


def read_state(optimizer: ChainedOptimizer, weights: list[Weight], checkpoint: Checkpoint, updates: int) -> None:
    """Fill this rank's state from the files; `updates` is how many updates had been made (`updates_of`).

    Raises InputError where the files do not hold a state, or hold it in another precision's form.
    """
    _allocate(optimizer)
    places = _places(weights)
    for member, parameter, start, end in _owned(optimizer):
        loaded = {}
        for name, current in _states(member, parameter).items():
            # Fused AdamW takes states as float32 and brings them into its own precision.
            dtype = torch.float32 if current.dtype.is_floating_point else current.dtype
            value = torch.empty(end - start, dtype=dtype, device="cpu")
            for place in places[parameter]:
                for begin, offset, shape in _shards_of(place, start, end):
                    key = _key(name, place)
                    if checkpoint.is_float(key) != current.dtype.is_floating_point:
                        raise InputError(
                            f"{checkpoint.directory}: the optimizer's state {name} is stored in another form: keep "
                            "the optim.moments_dtype that the run began with"
                        )
                    read = checkpoint.read(key, offset, shape, dtype, zero_outside=place.padded)
                    value[begin : begin + math.prod(shape)] = read.view(-1)
            loaded[name] = value.to(current.device)
        if _is_torch_adamw(member):
            loaded["step"] = torch.tensor(float(updates))
        _set_states(member, parameter, loaded)
    for member in _members(optimizer):
        if not _is_torch_adamw(member):
            for group in member.optimizer.param_groups:  # where fused AdamWs count
                group["step"] = updates


def updates_of(optimizer: ChainedOptimizer) -> int:
    """How many updates were made: what AdamW's bias correction counts.  All ranks must call."""
    counts = [0.0]
    for member in _members(optimizer):
        counts += [float(state["step"]) for state in member.optimizer.state.values() if "step" in state]
        counts += [float(group["step"]) for group in member.optimizer.param_groups if "step" in group]
    # A rank whose share of the parameters is empty has counted nothing.
    updates = torch.tensor([max(counts)], device=device())
    dist.all_reduce(updates, op=dist.ReduceOp.MAX)
    return int(updates)


def _members(optimizer: Any) -> list:
    """The optimizers that a chained one holds."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _is_torch_adamw(member: Any) -> bool:
    """Whether Megatron's optimizer holds torch's AdamW, which counts updates by parameter instead of by group."""
    return isinstance(member.optimizer, torch.optim.AdamW)


def _owned(optimizer: ChainedOptimizer) -> Iterator[tuple[Any, torch.nn.Parameter, int, int]]:
    """Every range of a parameter that this rank updates: (member of the chain, parameter, start, end), flattened."""
    for member in _members(optimizer):
        for dtypes in member.gbuf_ranges:
            for buckets in dtypes.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield member, parameter, ranges["param"].start, ranges["param"].end


def _states(member: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The master weight ("param") and the moments of this rank's range, by name.

    Moments of lower precision come without their scales, in float32 or bfloat16, as fused AdamW hands them out.
    """
    states = member._get_main_param_and_optimizer_states(parameter)
    if _scaled_by_inner(member):
        inner, main = member.optimizer, states["param"]
        states = {
            "param": main,
            **{name: inner.get_unscaled_state(main, name) for name in inner.state[main] if name != "step"},
        }
    return {name: value for name, value in states.items() if name != "step" and isinstance(value, torch.Tensor)}


@torch.no_grad()
def _set_states(member: Any, parameter: torch.nn.Parameter, states: dict[str, torch.Tensor]) -> None:
    if not _scaled_by_inner(member):
        member._set_main_param_and_optimizer_states(parameter, states)
        return
    main = member._get_main_param_and_optimizer_states(parameter)["param"]
    main.copy_(states.pop("param"))
    for name, value in states.items():
        member.optimizer.set_scaled_state(main, name, value)


def _scaled_by_inner(member: Any) -> bool:
    """Whether Megatron keeps the master weights and fused AdamW moments with scales (FP8 but for delayed scaling).

    Megatron then hands the moments out as they lie in memory, which without their scales means nothing.
    """
    config = member.config
    return config.use_precision_aware_optimizer and not config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def _flat_state(member: Any, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
    return _states(member, parameter)[name].detach().reshape(-1)


def _places(weights: list[Weight]) -> dict[torch.nn.Parameter, list[Weight]]:
    found: dict[torch.nn.Parameter, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.parameter, []).append(weight)
    return found


def _key(name: str, place: Weight) -> str:
    return f"optimizer.state.{name}.{place.key}"


def _shards_of(place: Weight, start: int, end: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Where elements start..end-1 of the parameter lie in the global tensor, as far as `place` covers them.

    (index of the first element in the range, global offset, shape) of each shard.
    """
    first, last = max(start, place.start), min(end, place.start + place.tensor.numel())
    done = first - start
    for offset, shape in shards_of_range(place.shape, first - place.start, last - place.start):
        yield done, tuple(a + b for a, b in zip(place.offset, offset, strict=True)), shape
        done += math.prod(shape)


def _stored_shards(place: Weight, name: str, dtype: torch.dtype, start: int, end: int, state: Any) -> list[Shard]:
    def cut(begin: int, shape: tuple[int, ...]) -> torch.Tensor:
        return state()[begin : begin + math.prod(shape)].view(shape)

    return [
        Shard(_key(name, place), place.global_shape, offset, shape, dtype, partial(cut, begin, shape))
        for begin, offset, shape in _shards_of(place, start, end)
    ]


def _allocate(optimizer: ChainedOptimizer) -> None:
    """Give an optimizer that made no update yet its (zero) state; nothing else changes."""
    for member in _members(optimizer):
        if not member.config.use_precision_aware_optimizer:
            member.init_state_fn(member.optimizer, member.config)
            continue
        # As Transformer Engine does at the first update; Megatron-Core 0.16 leaves out the second argument.
        inner = member.optimizer
        remainders = getattr(inner, "store_param_remainders", False)
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.initialize_state(parameter, remainders and parameter.dtype == torch.bfloat16)
    for member in filter(_is_torch_adamw, _members(optimizer)):
        for parameter, state in member.optimizer.state.items():
            # Its fused kernel wants the count of steps beside the parameter.
            state.setdefault("step", torch.zeros((), device=parameter.device))
