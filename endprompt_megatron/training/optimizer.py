"""Megatron's distributed AdamW, its learning-rate schedule, and one guarded update.

The update is Megatron's own sequence (prepare, norm, clip, step) with a check in the middle: an update whose
loss or gradient norm is not finite is skipped.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from endprompt_megatron.config.recipe import Optim, Parallel, Precision
from endprompt_megatron.distributed.runtime import overlaps_communication


def wrap_models(models: list, p: Parallel, precision: Precision) -> list[DistributedDataParallel]:
    """DDP around each chunk: gradients are accumulated, reduced and sharded for the distributed optimizer."""
    # With one rank there is no communication to overlap.
    worthwhile = (
        overlaps_communication() and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    )
    reduce = p.overlap_grad_reduce if p.overlap_grad_reduce is not None else worthwhile
    gather = p.overlap_param_gather if p.overlap_param_gather is not None else reduce
    interleaved = bool(p.virtual_pipeline and p.virtual_pipeline > 1)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.grad_reduce == "float32",
        use_distributed_optimizer=True,
        overlap_grad_reduce=reduce,
        overlap_param_gather=gather,
        # Aligned, buckets wait for the schedule to start their gathers, which only the interleaved one does.
        align_param_gather=gather and interleaved,
        check_for_nan_in_grad=False,  # `update` looks at the norm and can skip; Megatron's check aborts
    )
    # When several chunks share the schedule, only the first one's buckets are worth splitting.
    wrapped = [
        DistributedDataParallel(config=chunk.config, ddp_config=config, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(models)
    ]
    if reduce:
        _schedule_reduction(wrapped, align=p.pipeline > 1)
    if config.align_param_gather:
        wrapped[0].config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _schedule_reduction(wrapped: list[DistributedDataParallel], align: bool) -> None:
    """Tell the pipeline's schedule when to reduce gradients: with the last micro-batch, on all stages at once."""
    config = wrapped[0].config
    config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
    if align:
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])


def _one_or_all(functions: list) -> Any:
    return functions if len(functions) > 1 else functions[0]


@contextlib.contextmanager
def complete_parameters(models: list) -> Iterator[None]:
    """Complete weights for code outside a training step: overlapped gathers bring them layer by layer."""
    overlapped = [model for model in models if model.ddp_config.overlap_param_gather]
    for model in overlapped:
        model.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for model in overlapped:
            model.enable_forward_pre_hook()


def build_optimizer(models: list, o: Optim, precision: Precision, steps: int) -> tuple[Any, OptimizerParamScheduler]:
    """Distributed AdamW over the wrapped chunks, float32 master weights and state, and its schedule over `steps`.

    Weight decay leaves out the norms, as in Megatron and transformers.
    """
    bf16 = precision.dtype == "bfloat16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_eps=o.eps,
        clip_grad=o.grad_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=any(model.ddp_config.overlap_param_gather for model in models),
        fp8_recipe=precision.fp8_recipe if precision.fp8 else None,
        **_low_precision(o, precision),
    )
    optimizer = get_megatron_optimizer(config, models)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):  # where neither Transformer Engine nor Apex is installed
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)  # one pass over each parameter instead of about ten
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        # Counted in steps.  As in transformers, the first step of a warm-up has rate 0.
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=max(steps, o.warmup_steps + 1),
        lr_decay_style=o.schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


_MOMENTS = {"bfloat16": torch.bfloat16, "fp8": torch.uint8}


def _low_precision(o: Optim, precision: Precision) -> dict[str, Any]:
    """Moments in fewer bits, with Transformer Engine's AdamW; the master weights stay float32."""
    moments = o.moments_dtype
    if moments == "float32":
        return {}
    return dict(
        use_precision_aware_optimizer=True,
        main_grads_dtype=torch.float32 if precision.grad_reduce == "float32" else torch.bfloat16,
        exp_avg_dtype=_MOMENTS[moments],
        exp_avg_sq_dtype=_MOMENTS[moments],
    )


def zero_grad(models: list, optimizer: Any) -> None:
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()


def update(optimizer: ChainedOptimizer, loss: float, clip: float) -> tuple[float, bool]:
    """One AdamW update.  Returns the gradient norm before clipping and whether the update was made.

    The norm is over all ranks and the same on each, so all of them skip or none does.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return norm, False
    if clip > 0:
        for part in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(
                part.get_parameters(),
                max_norm=clip,
                total_norm=norm,
                # With moments in fewer bits, Megatron hands the gradients to TE's AdamW beside `grad`, which is empty.
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    return norm, True
