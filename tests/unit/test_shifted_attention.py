"""Shifted sparse attention equals dense attention under a mask that is written out, gradients too."""

import pytest
import torch

from endprompt_megatron.config.recipe import LongLora
from endprompt_megatron.model.longlora import seen_tokens
from endprompt_megatron.model.shifted_attention import grouped


def dense_mask(length: int, heads: int, groups: int, plain: int) -> torch.Tensor:
    """[h, s, s] bool, head by head and token by token: who sees whom."""
    group = length // groups
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        shift = 0 if head < plain else group // 2
        for i in range(length):
            for j in range(i + 1):
                mask[head, i, j] = (i + shift) // group == (j + shift) // group
    return mask


@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups", "plain", "batch"),
    [(4, 2, 4, 2, 1), (4, 4, 4, 2, 3), (9, 3, 4, 4, 1), (4, 1, 2, 2, 2), (4, 2, 4, 0, 2), (4, 2, 4, 4, 1)],
    ids=["gqa", "mha-rows", "odd-heads", "two-groups", "all-shifted", "none-shifted"],
)
def test_it_equals_dense_attention_under_the_mask(heads, kv_heads, groups, plain, batch):
    torch.manual_seed(0)
    length, width = 40 if groups == 4 else 36, 8
    sizes = ((length, batch, n, width) for n in (heads, kv_heads, kv_heads))
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    upstream = torch.randn(length, batch, heads, width, dtype=torch.float64)

    found = grouped(*inputs, groups, plain, 0.3)
    gradients = torch.autograd.grad(found, inputs, upstream)

    query, key, value = inputs
    key, value = (x.repeat_interleave(heads // kv_heads, 2) for x in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) * 0.3
    scores = scores.masked_fill(~dense_mask(length, heads, groups, plain), -torch.inf)
    expected = torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), value)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream))


@pytest.mark.parametrize(("groups", "length"), [(4, 64), (2, 32), (8, 128)])
def test_the_planner_counts_the_pairs_that_the_mask_has(groups, length):
    """A pair of a token with itself counts half: in flash attention's count, half of the square is computed."""
    mask = dense_mask(length, 2, groups, 1)
    pairs = mask.sum().item() - mask.diagonal(dim1=1, dim2=2).sum().item() / 2
    assert seen_tokens(LongLora(shifted=True, groups=groups), length) == pytest.approx(pairs / length / 2)
    assert seen_tokens(LongLora(), length) == length / 2
