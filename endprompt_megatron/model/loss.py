"""Weighted next-token loss, normalised over the global batch, with the context's and the prompt's losses apart.

L = sum_i w_i CE_i / sum_i w_i, both sums over every micro-batch of every data- and context-parallel rank
(EndPrompt, section 3): w is 1 where the target is a context token, `prompt_loss_weight` where it is a
prompt token, 0 at the last position, which has no target.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def total_weight(micro_batches: Iterable[dict[str, Tensor]], group: dist.ProcessGroup) -> Tensor:
    """Sum of the weights of the global batch, a float64 scalar, the same on all ranks.

    Every rank reads its micro-batches before the first forward pass, so this is known in advance and the
    loss can be divided where it arises.  `group`: data- and context-parallel ranks.
    """
    device = next(iter(micro_batches))["loss_weights"].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in micro_batches:
        total += batch["loss_weights"].sum(dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total


def weighted_loss(losses: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """This micro-batch's share of the global loss, a float32 scalar.

    losses, weights [b, s] float32; total: `total_weight`.
    """
    return (losses.float() * weights).sum() / total.float()


def loss_parts(losses: Tensor, weights: Tensor, prompt_mask: Tensor) -> Tensor:
    """Float64 [4]: sum and count of context targets' losses, sum and count of prompt targets', unweighted.

    losses, weights [b, s] float32; prompt_mask [b, s] bool.  Targets of weight 0 are not counted.
    """
    counted = weights > 0
    context, prompt = counted & ~prompt_mask, counted & prompt_mask
    losses = losses.detach().double()
    zero = losses.new_zeros(())
    return torch.stack(
        [
            torch.where(context, losses, zero).sum(),
            context.sum().double(),
            torch.where(prompt, losses, zero).sum(),
            prompt.sum().double(),
        ]
    )


def split_loss(parts: Tensor) -> tuple[float, float | None]:
    """Mean loss of the context targets and of the prompt targets (None where there are none)."""
    context_sum, context_count, prompt_sum, prompt_count = parts.tolist()
    context = context_sum / context_count if context_count else float("nan")
    return context, prompt_sum / prompt_count if prompt_count else None


def target_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss float32 and greedy correctness bool of every target, both [b, s].

    logits [b, s, v / tensor parallel], this rank's shard of the vocabulary; labels [b, s] int64.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    best = logits.max(dim=-1).values.float()
    start = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    local = (labels - start).clamp(0, logits.shape[-1] - 1)
    here = (labels >= start) & (labels < start + logits.shape[-1])
    predicted = logits.gather(-1, local[..., None])[..., 0].float().masked_fill(~here, float("-inf"))
    for values in (best, predicted):
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return vocab_parallel_cross_entropy(logits.float(), labels), predicted >= best
