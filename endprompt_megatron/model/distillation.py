"""Divergence of two models' next-token distributions over a vocabulary that tensor-parallel ranks share.

As cross_entropy.py, it keeps logits as they came and works through a few rows at a time.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from endprompt_megatron.model.cross_entropy import blocks_of, log_sums


def vocab_divergence(logits: Tensor, base: Tensor, true_vocab: int, group: dist.ProcessGroup) -> Tensor:
    """KL(base || model) [..] float32 in nats, for each row of logits.

    logits, base [.., v / tensor parallel], this rank's shard of the trained model's and of the frozen one's logits;
    true_vocab: how many of this rank's entries are real.  Gradients reach `logits` alone, whose memory the backward
    pass writes them into, so it can run once.
    """
    return _Divergence.apply(logits, base, true_vocab, group)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor, true_vocab: int, group: dist.ProcessGroup) -> Tensor:
        rows, theirs = logits.view(-1, logits.shape[-1]), base.reshape(-1, base.shape[-1])
        ours_sum, base_sum = (log_sums(each, true_vocab, group) for each in (rows, theirs))
        apart = torch.zeros(len(rows), device=rows.device)
        for block in blocks_of(rows):
            of_base = theirs[block, :true_vocab].float()
            share = (of_base - base_sum[block, None]).exp_()
            apart[block] = (share * (of_base - rows[block, :true_vocab].float())).sum(-1)
        if group.size() > 1:
            dist.all_reduce(apart, group=group)
        ctx.save_for_backward(logits, base, ours_sum, base_sum)
        ctx.true_vocab = true_vocab
        return (apart + ours_sum - base_sum).view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, base, ours_sum, base_sum = ctx.saved_tensors
        rows, theirs = logits.view(-1, logits.shape[-1]), base.reshape(-1, base.shape[-1])
        upstream = upstream.reshape(-1)
        for block in blocks_of(rows):
            gradient = (rows[block, : ctx.true_vocab].float() - ours_sum[block, None]).exp_()
            gradient.sub_((theirs[block, : ctx.true_vocab].float() - base_sum[block, None]).exp_())
            rows[block, : ctx.true_vocab] = gradient.mul_(upstream[block, None]).to(rows.dtype)
            rows[block, ctx.true_vocab :] = 0
        return logits, None, None, None
