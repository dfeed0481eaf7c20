"""One global batch through Megatron's pipeline schedules: forward and backward, or forward alone.

Each rank holds the step's micro-batches as a list (they are small: five numbers per token), so every virtual
pipeline chunk iterates over the same ones and every stage knows its position ids.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from endprompt_megatron.distributed.watchdog import Watch
from endprompt_megatron.model.loss import (
    loss_parts,
    split_loss,
    target_losses,
    total_weight,
    weighted_loss,
)
from endprompt_megatron.training.retention import RETAINED, MicroBatch, Retention


@dataclass(frozen=True)
class Losses:
    """Losses of a global batch, the same on all ranks.  `prompt` is None for methods without a prompt.

    `targets`: number of predicted tokens, which for packed rows is not known in advance.  `retained`: mean divergence
    from the base in nats, in steps that have one (retention.py); it is not part of `total`.
    """

    total: float
    context: float
    prompt: float | None
    targets: int | None = None
    retained: float | None = None


def run_batch(
    models: list,
    micro_batches: list[MicroBatch],
    *,
    backward: bool,
    watch: Watch | None = None,
    retention: Retention | None = None,
) -> Losses:
    """Losses of a global batch; with `backward`, gradients too, reduced over all ranks and ready to step.

    models: this rank's DDP-wrapped chunks.  micro_batches: this rank's share, tensors on its device.  `watch` is
    told when this rank's own computation begins and ends.  `retention` takes the micro-batches that it has added.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    total = total_weight(micro_batches, group)
    if watch is not None:
        watch.compute_begins()
    get_model_config(models[0]).finalize_model_grads_func = partial(_finalize, watch=watch)
    loss = partial(_loss, total=total, retention=retention)
    reports = _schedule(models, micro_batches, loss, forward_only=not backward)
    return _gather(reports, micro_batches[0]["tokens"].device, group)


def token_losses(models: list, micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor] | None:
    """Loss [n, s] float32 and correctness [n, s] bool of every target, on the last pipeline stage; otherwise None.

    For validation probes; the models are in eval mode.
    """
    with torch.no_grad():
        reports = _schedule(models, micro_batches, None, forward_only=True)
    if not reports:
        return None
    return torch.cat([losses for losses, _ in reports]), torch.cat([correct for _, correct in reports])


def _schedule(models: list, micro_batches: list[MicroBatch], report: Any, *, forward_only: bool) -> list:
    rows, length = micro_batches[0]["tokens"].shape  # packed rows are joined into one
    chunks = [iter(micro_batches) for _ in models]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward, report=report),
        data_iterator=chunks if len(chunks) > 1 else chunks[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(micro_batches),
        # Megatron sizes the pipeline's buffers for the complete sequence and divides by TP and CP itself.
        seq_length=length * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def _forward(chunk: Any, model: torch.nn.Module, report: Any) -> tuple[Tensor, Any]:
    """Megatron's forward step.  Without `report`, it keeps the logits and reports every target."""
    batch = next(chunk)
    if report is None:
        output = model(batch["tokens"], batch["position_ids"])
        return output, partial(_token_report, batch, unwrap_model(model))
    if RETAINED in batch:
        return model(batch["tokens"], batch["position_ids"]), partial(report, batch)
    output = model(batch["tokens"], batch["position_ids"], labels=batch["labels"], cu_seqlens=batch.get("cu_seqlens"))
    return output, partial(report, batch)


def _loss(
    batch: MicroBatch, output: Tensor, total: Tensor, retention: Retention | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's loss triple: loss, number of tokens (unused, the loss is normalised already), the report.

    output: losses [b, s]; logits [b, s, v / tensor parallel] of what is compared with the base.
    """
    if RETAINED in batch:
        loss, apart = retention.loss(batch, output)
        report = torch.cat([apart.new_zeros(5), apart])
    else:
        loss = weighted_loss(output, batch["loss_weights"], total)
        parts = loss_parts(output, batch["loss_weights"], batch["prompt_mask"])
        report = torch.cat([loss.detach().double()[None], parts, parts.new_zeros(2)])
    return loss, torch.ones((), dtype=torch.int, device=loss.device), report


def _token_report(batch: MicroBatch, model: Any, logits: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    losses, correct = target_losses(model.without_padding(logits), batch["labels"])
    return losses.sum(), torch.ones((), dtype=torch.int, device=losses.device), (losses, correct)


def _finalize(models: list, _num_tokens: Tensor | None, *, watch: Watch | None, **kwargs: Any) -> None:
    """Megatron's gradient reductions, without its division by a count of tokens."""
    if watch is not None:
        watch.compute_ends()
    finalize_model_grads(models, None, **kwargs)


def _gather(reports: list, device: torch.device, group: dist.ProcessGroup) -> Losses:
    sums = torch.stack(reports).sum(0) if reports else torch.zeros(7, dtype=torch.float64, device=device)
    dist.all_reduce(sums, group=group)
    # Only the last pipeline stage has them; broadcast them, so that every rank decides the same.
    dist.broadcast(
        sums,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    context, prompt = split_loss(sums[1:5])
    retained = float(sums[5] / sums[6]) if sums[6] else None
    return Losses(float(sums[0]), context, prompt, int(sums[2] + sums[4]), retained)
