"""The weighted loss and its parts, by hand numbers."""

import math

import pytest
import torch

from endprompt_megatron.model.loss import loss_parts, split_loss, weighted_loss

# Two samples of four targets: three context tokens and a prompt token; a prompt of two and no target at the end.
LOSSES = torch.tensor([[1.0, 2.0, 3.0, 8.0], [4.0, 6.0, 10.0, 99.0]])
WEIGHTS = torch.tensor([[1.0, 1.0, 1.0, 0.5], [1.0, 0.5, 0.5, 0.0]])
PROMPT = torch.tensor([[False, False, False, True], [False, True, True, True]])


def test_loss_is_the_weighted_sum_over_the_weight_of_the_global_batch():
    # 1 + 2 + 3 + 8/2 + 4 + 6/2 + 10/2 = 22, over a batch of weight 11 of which this is one half
    total = torch.tensor(11.0, dtype=torch.float64)
    loss = weighted_loss(LOSSES, WEIGHTS, total)
    assert loss.item() == 2.0
    assert loss.dtype == torch.float32


def test_gradient_of_a_target_is_its_weight_over_the_total():
    losses = LOSSES.clone().requires_grad_()
    weighted_loss(losses, WEIGHTS, torch.tensor(11.0)).backward()
    torch.testing.assert_close(losses.grad, WEIGHTS / 11)


def test_losses_of_micro_batches_add_up_to_that_of_the_batch_however_it_is_cut():
    total = WEIGHTS.sum(dtype=torch.float64)
    whole = weighted_loss(LOSSES, WEIGHTS, total)
    rows = sum(weighted_loss(LOSSES[i : i + 1], WEIGHTS[i : i + 1], total) for i in range(2))
    assert rows.item() == pytest.approx(whole.item(), rel=1e-7)
    # Normalised by micro-batch it would be another number: the rows have different weights.
    means = sum(weighted_loss(LOSSES[i : i + 1], WEIGHTS[i : i + 1], WEIGHTS[i].sum()) for i in range(2)) / 2
    assert abs(means.item() - whole.item()) > 0.1


def test_loss_in_bfloat16_is_summed_in_float32():
    losses = torch.ones(1, 1000, dtype=torch.bfloat16)
    assert weighted_loss(losses, torch.ones(1, 1000), torch.tensor(1000.0)).item() == 1.0


def test_loss_parts_are_unweighted_sums_and_counts_of_targets_with_a_weight():
    parts = loss_parts(LOSSES, WEIGHTS, PROMPT)
    assert parts.tolist() == [1 + 2 + 3 + 4, 4, 8 + 6 + 10, 3]
    assert parts.dtype == torch.float64
    assert split_loss(parts) == (2.5, 8.0)


def test_a_target_of_weight_zero_may_be_anything():
    losses = LOSSES.clone()
    losses[1, 3] = float("nan")
    assert loss_parts(losses, WEIGHTS, PROMPT).tolist() == [10, 4, 24, 3]


def test_loss_parts_without_targets_have_no_prompt_loss():
    context, prompt = split_loss(torch.tensor([6.0, 3.0, 0.0, 0.0]))
    assert (context, prompt) == (2.0, None)
    context, prompt = split_loss(torch.tensor([0.0, 0.0, 6.0, 3.0]))
    assert math.isnan(context)
    assert prompt == 2.0
