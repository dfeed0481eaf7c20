"""Cross entropy over a vocabulary that tensor-parallel ranks share, some rows at a time.

Megatron's own keeps float32 probabilities of all of [s, b, v] until the backward pass; with 49152 to
128256 entries a token that is the largest tensor of a small model's step.  This one keeps the logits as
they came and works through a few rows at a time, and it leaves padded vocabulary out.

Transformer Engine's keeps a float32 gradient of them since 2.18; before, it rounded gradients to BF16 twice.  In every
version its backward pass makes the host wait for the GPU, and Megatron-LM refuses it for "stability issues".
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Float32 elements worked on at a time: 2 MiB, which a core keeps in its cache; on a GPU 256 MiB, where a block costs
# the launch of its kernels, some 40,000 a micro-batch of 8K tokens if they were as small.
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}


def vocab_cross_entropy(logits: Tensor, labels: Tensor, true_vocab: int, group: dist.ProcessGroup) -> Tensor:
    """Loss [s, b] float32 of every target.

    logits [s, b, v / tensor parallel], this rank's shard; labels [s, b] int64; true_vocab: how many of this
    rank's entries are real, the rest is padding and takes no probability.  The backward pass writes the
    gradient into the memory of `logits`, so it can run once.
    """
    return _CrossEntropy.apply(logits, labels, true_vocab, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, true_vocab: int, group: dist.ProcessGroup) -> Tensor:
        rows = logits.view(-1, logits.shape[-1])
        local = labels.reshape(-1) - group.rank() * logits.shape[-1]
        here = (local >= 0) & (local < logits.shape[-1])
        local = local.clamp(0, logits.shape[-1] - 1)
        target = rows.gather(1, local[:, None])[:, 0].float().masked_fill_(~here, 0.0)
        log_sum = log_sums(rows, true_vocab, group)
        if group.size() > 1:
            dist.all_reduce(target, group=group)
        ctx.save_for_backward(logits, local, here, log_sum)
        ctx.true_vocab = true_vocab
        return (log_sum - target).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, local, here, log_sum = ctx.saved_tensors
        rows = logits.view(-1, logits.shape[-1])
        upstream = upstream.reshape(-1)
        for block in blocks_of(rows):
            gradient = rows[block, : ctx.true_vocab].float().sub_(log_sum[block, None]).exp_()
            # softmax - 1 at the target; a target on another rank gets 0 subtracted here.
            if ctx.true_vocab:
                column = local[block, None].clamp(max=ctx.true_vocab - 1)
                gradient.scatter_add_(1, column, -here[block, None].float())
            rows[block, : ctx.true_vocab] = gradient.mul_(upstream[block, None])
            rows[block, ctx.true_vocab :] = 0
        return logits, None, None, None


def log_sums(rows: Tensor, true_vocab: int, group: dist.ProcessGroup) -> Tensor:
    """Logarithm of the sum of exponentials of each row over all ranks' shards, float32 [n].

    rows [n, v / tensor parallel], of which the first `true_vocab` entries count.
    """
    # A rank whose shard is all padding has nothing to sum: minus infinity.
    log_sum = torch.full((len(rows),), float("-inf"), device=rows.device)
    for block in blocks_of(rows):
        if true_vocab:
            log_sum[block] = rows[block, :true_vocab].float().logsumexp(-1)
    if group.size() > 1:
        largest = log_sum.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total = (log_sum - largest).exp_()
        dist.all_reduce(total, group=group)
        log_sum = total.log_().add_(largest)
    return log_sum


def blocks_of(rows: Tensor) -> list[slice]:
    """Slices of rows, as many at a time as are worked on in float32."""
    step = max(1, _BLOCK_ELEMENTS[rows.device.type] // rows.shape[1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]
