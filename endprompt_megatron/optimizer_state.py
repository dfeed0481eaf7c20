"""The optimizer's state in a checkpoint: float32 master weights and moments in their parameters' own shapes.

Megatron's `fully_reshardable` form, which any layout can load.  Three things about it are ours: no copies
where there is one data-parallel rank, and two detours around faults that show with torch's AdamW.
"""

from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer

FORM = "fully_reshardable"
METADATA = {"distrib_optim_sharding_type": FORM}


def sharded_state(optimizer: ChainedOptimizer, model_state: ShardedStateDict, *, loading: bool) -> dict:
    """Sharded state dict of the optimizer, to be saved or (`loading`) loaded into.

    Megatron gathers the state of all data-parallel ranks into buffers and hands out copies of those.  Where
    there is one such rank, each parameter's state is whole already and is handed over as it is, which keeps
    a save from taking twice the state in memory.
    """
    _allocate(optimizer)
    (part,) = optimizer.chained_optimizers
    if part.data_parallel_group.size() > 1:
        return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=METADATA)
    weights, _ = extract_sharded_tensors_and_factories(model_state)
    sharded = {weight.data: weight for weight in nested_values(weights)}
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    state = part.state_dict()
    state["param_state"] = {
        number: {
            name: _placed_as(sharded[parameter], f"optimizer.state.{name}.", value.view(parameter.shape))
            for name, value in part._get_main_param_and_optimizer_states(parameter).items()
            if name != "step"
        }
        for number, parameter in enumerate(parameters)
    }
    state["param_state_sharding_type"] = FORM
    return state


def load_state(optimizer: ChainedOptimizer, state: dict) -> None:
    """Load what `sharded_state` described, once it is read.

    With torch's AdamW, Megatron stumbles over its count of steps: it looks for one in every parameter's
    loaded state, where there is none, and gives all parameters one and the same tensor, which AdamW counts
    up in place.  So the counts are set aside while the parameters' state is loaded, and each gets its own.
    """
    adamw = torch_adamw(optimizer)
    if not adamw:
        optimizer.load_state_dict(state)
        return
    (part,) = optimizer.chained_optimizers
    by_parameter = state.pop("param_state")
    optimizer.load_state_dict(state)
    states = [state for inner in adamw for state in inner.state.values()]
    steps = [state.pop("step").clone() for state in states]
    part.load_parameter_state_from_fully_reshardable(by_parameter)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step


def torch_adamw(optimizer: ChainedOptimizer) -> list[torch.optim.AdamW]:
    """torch's AdamW inside Megatron's optimizer, which is there without Transformer Engine and Apex."""
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [optimizer for optimizer in inner if isinstance(optimizer, torch.optim.AdamW)]


def _allocate(optimizer: ChainedOptimizer) -> None:
    """Give an optimizer that made no update yet its (zero) state; nothing else changes."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    for inner in torch_adamw(optimizer):
        for state in inner.state.values():
            state.setdefault("step", torch.zeros(()))


def _placed_as(weight: ShardedTensor, prefix: str, value: torch.Tensor) -> ShardedTensor:
    """`value`, stored where `weight` is in the model: the same slice of a global tensor under a longer key."""
    # A factory (of gate and up) makes tensors of their data when it is asked; it has no dtype of its own.
    dtype = {"dtype": value.dtype} if isinstance(weight, ShardedTensor) else {}
    return replace(weight, key=prefix + weight.key, data=value, **dtype)
