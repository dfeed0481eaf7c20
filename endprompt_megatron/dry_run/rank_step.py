"""The step itself: the project's own model, optimizer, schedule and update, with the choices that a GPU makes."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.dry_run import fake_world
from endprompt_megatron.model.shape import ModelShape

_POINTS = 600  # of the picture of memory
_PACKAGE = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Step:
    """What one rank does in a step.  Bytes; FLOPs of matrix products without attention's."""

    rank: int
    world_size: int
    stage: int
    layers: list[int]  # of each chunk
    parameters: int
    buckets: int
    micro_batches: int
    built: int  # bytes that live before the step
    backward_peak: int
    state: int  # of the optimizer, that the first update makes and every later step holds
    peak: int  # of every step but the first
    flops: int
    traffic: dict[tuple[str, str], tuple[int, int]]  # (operation, group): count, bytes
    syncs: Counter[tuple[str, str]]  # (kind, line) of values that the host reads in forward and backward
    memory: list[tuple[float, int]]  # over every later step: share of the FLOPs done, bytes; the last is the update
    elsewhere: list[str]  # tensors of modules on another device than the model
    seconds: float


def dry_run(recipe: Recipe, export_config: dict, shape: ModelShape, rank: int, world_size: int) -> Step:
    """Run a step as rank `rank`.  The process is of no other use afterwards.

    `export_config`: as in model.llama.build_chunks.  Without Transformer Engine: its layers are not built.
    """
    from endprompt_megatron.distributed import cpu, runtime

    started, p = time.monotonic(), recipe.parallel
    torch.set_num_threads(1)
    cpu.install()
    fake_world.enter(rank, world_size)
    runtime.start(p.tensor, p.pipeline, p.virtual_pipeline, p.context, recipe.train.seed)
    from megatron.core import parallel_state
    from torch._subclasses.fake_tensor import FakeTensorMode

    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.training.optimizer import build_optimizer, update, wrap_models, zero_grad
    from endprompt_megatron.training.retention import Retention
    from endprompt_megatron.training.step import run_batch

    _choose_as_a_gpu()
    replicas = parallel_state.get_data_parallel_world_size()
    count = recipe.train.global_batch_size // (recipe.train.micro_batch_size * replicas)
    ledger = fake_world.Ledger(_names_of_groups(world_size))
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        models = wrap_models(build_model(shape, recipe, export_config), recipe.parallel, recipe.precision)
        optimizer, _ = build_optimizer(models, recipe.optim, recipe.precision, recipe.train.steps)
        batch, retention = [_micro_batch(recipe) for _ in range(count)], None
        if recipe.context.retain.weight:
            retention = Retention(recipe, shape, export_config)
            batch = retention.added_to(batch, 0)
        built = ledger.peak = ledger.live
        ledger.flops = 0
        ledger.curve.clear()
        ledger.count.clear()
        ledger.bytes.clear()
        zero_grad(models, optimizer)
        with fake_world.counted_syncs(_PACKAGE) as syncs:
            losses = run_batch(models, batch, backward=True, retention=retention)
        syncs, backward_peak, curve = Counter(syncs), ledger.peak, list(ledger.curve)
        with fake_world.counted_syncs(_PACKAGE):
            update(optimizer, losses.total, recipe.optim.grad_clip)
        zero_grad(models, optimizer)
        state = ledger.live - built
    traffic = {key: (number, ledger.bytes[key]) for key, number in sorted(ledger.count.items())}
    return Step(
        rank=rank,
        world_size=world_size,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        layers=[len(model.module.decoder.layers) for model in models],
        parameters=sum(parameter.numel() for model in models for parameter in model.parameters()),
        buckets=sum(len(buffer.buckets) for model in models for buffer in model.buffers),
        micro_batches=count,
        built=built,
        backward_peak=backward_peak,
        state=state,
        peak=max(backward_peak + state, ledger.peak),
        memory=[*_thinned(curve, ledger.flops, state), (1.0, ledger.peak)],
        flops=ledger.flops,
        traffic=traffic,
        syncs=syncs,
        elsewhere=_elsewhere(models),
        seconds=time.monotonic() - started,
    )


def _thinned(curve: list[tuple[int, int]], flops: int, state: int) -> list[tuple[float, int]]:
    """The most of each of _POINTS equal shares of the FLOPs."""
    most: dict[int, int] = {}
    for done, live in curve:
        place = min(_POINTS - 1, done * _POINTS // max(1, flops))
        most[place] = max(most.get(place, 0), live + state)
    return [(place / _POINTS, size) for place, size in sorted(most.items())]


def _choose_as_a_gpu() -> None:
    """Overlap and batched sends as on GPUs; an attention of Transformer Engine's shapes instead of the CPU's."""
    from endprompt_megatron.model import llama
    from endprompt_megatron.model.attention import SdpaAttention
    from endprompt_megatron.training import optimizer

    optimizer.overlaps_communication = lambda: True
    llama.has_transformer_engine = lambda: False  # where it is installed: its layers need a GPU
    llama.device_options = lambda *, virtual_pipeline: {
        "use_cpu_initialization": True,
        "overlap_p2p_comm": virtual_pipeline,
        "batch_p2p_comm": not virtual_pipeline,
    }
    SdpaAttention.forward = _attention


def _attention(_self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    """[s, b, h, d] -> [s, b, h * d] of this rank's share alone: what the ring brings is not there."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return found.permute(2, 0, 1, 3).flatten(2)


def _micro_batch(recipe: Recipe) -> dict[str, torch.Tensor]:
    rows, length = recipe.train.micro_batch_size, recipe.context.physical // recipe.parallel.context
    return {
        "tokens": torch.zeros(rows, length, dtype=torch.int64),
        "labels": torch.zeros(rows, length, dtype=torch.int64),
        "position_ids": torch.zeros(1, length, dtype=torch.int64),
        "loss_weights": torch.ones(rows, length),
        "prompt_mask": torch.zeros(rows, length, dtype=torch.bool),
    }


def _names_of_groups(world_size: int) -> dict[str, str]:
    from megatron.core import parallel_state

    names = {torch.distributed.group.WORLD.group_name: f"world[{world_size}]"}
    for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "data_parallel"):
        group = getattr(parallel_state, f"get_{name}_group")()
        names.setdefault(group.group_name, f"{name.partition('_')[0]}[{group.size()}]")
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    names.setdefault(group.group_name, f"data and context[{group.size()}]")
    group = parallel_state.get_intra_distributed_optimizer_instance_group()
    names.setdefault(group.group_name, f"optimizer[{group.size()}]")
    return names


def _elsewhere(models: list) -> list[str]:
    """Names of parameters and buffers on another device than the first parameter."""
    found = []
    for model in models:
        home = next(model.parameters()).device
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.device != home:
                found.append(name)
    return found
