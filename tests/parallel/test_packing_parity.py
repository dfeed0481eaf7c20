"""Packed rows: loss and every gradient are those of each sample run alone through Hugging Face's LLaMA, in float32."""

import numpy as np
import pytest
import torch
from parallel.cases import (
    LAYOUTS,
    build,
    compare,
    huggingface_model,
    join_gradients,
    losses_and_gradients,
    make_packed,
    micro_batches,
    recipe_for,
)

from endprompt_megatron.model.shape import read_shape

PACKED = ["data.packing=documents"]
TIGHT = [*PACKED, "context.physical=48"]
METHODS = ("end_prompt", "end_prompt_random", "end_prompt_pose", "pose", "short")
TOLERANCE = 1e-5


def packed(recipe, rows):
    return make_packed(recipe, read_shape(recipe.model.hf).vocab_size, rows)


def check(ranks, models, layout, *overrides, shape="gqa", rows=8):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models(shape), *keys, *TIGHT, *overrides)
    compare(ranks, world, recipe, *packed(recipe, rows), TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    ["tp1-pp1", "tp2", "pp2", "pp2-vpp2", "tp2-pp2-sp", "tp2-dp2", "cp2", "cp4", "cp2-tp2-sp", "cp2-pp2", "cp2-dp2"],
)
def test_packed_rows_equal_samples_alone_in_layout(ranks, models, layout):
    check(ranks, models, layout)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp2-sp", "cp2", "pp2-vpp2"])
def test_packed_rows_equal_samples_alone_with_micro_batch(ranks, models, layout, rows):
    sizes = [f"train.micro_batch_size={rows}", f"train.global_batch_size={4 * rows}"]
    check(ranks, models, layout, *sizes, "context.method=end_prompt_random", rows=4 * rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp2-sp", "cp2"])
def test_packed_rows_equal_samples_alone_with_method(ranks, models, layout, method):
    check(ranks, models, layout, f"context.method={method}", "train.micro_batch_size=2")


@pytest.mark.parametrize("rope", ["linear", "ntk", "yarn", "llama3", "none"])
@pytest.mark.parametrize("layout", ["tp1-pp1", "cp2"])
def test_packed_rows_equal_samples_alone_with_rope(ranks, models, layout, rope):
    check(ranks, models, layout, f"context.rope.type={rope}", "train.micro_batch_size=2")


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layout", ["tp2-pp2-sp", "cp2"])
def test_packed_rows_equal_samples_alone_with_recompute(ranks, models, layout, recompute):
    check(ranks, models, layout, f"parallel.recompute={recompute}", "train.micro_batch_size=2")


def test_a_wider_alignment_changes_nothing_but_the_padding(ranks, models):
    check(ranks, models, "tp2-pp2-sp", "data.align=16", "train.micro_batch_size=2")


def conversations(recipe, count, seed=0):
    """Packed rows in which only the answers have a weight, and each conversation alone with labels as transformers."""
    generator = np.random.default_rng(seed)
    rows, alone = packed(recipe, count)
    taken = iter(alone)
    for row in rows:
        row["loss_weights"][:] = 0
        for start in row["cu_seqlens"][:-1].tolist():
            if not row["position_ids"][start : start + 2].any():  # what is left of the row
                continue
            sample = next(taken)
            # Two questions with answers: tokens 3 .. first and from `second` to the end are answers.
            length = len(sample["tokens"])
            first, second = np.sort(generator.integers(4, length, 2))
            answer = np.zeros(length, bool)
            answer[3:first] = answer[second:] = True
            sample["loss_weights"] = np.append(answer[1:], False).astype(np.float32)
            row["loss_weights"][start : start + length] = sample["loss_weights"]
            sample["answers"] = np.where(answer, sample["tokens"], -100)
    assert next(taken, None) is None
    return rows, alone


@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp2-sp", "cp2"])
def test_packed_conversations_equal_each_alone_with_labels_on_its_answers(ranks, models, layout):
    world, keys = LAYOUTS[layout]
    overrides = ["data.kind=chat", "context.method=short", "train.micro_batch_size=2"]
    recipe = recipe_for(*models("gqa"), *keys, *TIGHT, *overrides)
    rows, alone = conversations(recipe, 8)
    results = ranks.run(world, losses_and_gradients, recipe, rows)
    model = huggingface_model(recipe)
    total, count = 0.0, sum(int((sample["answers"][1:] != -100).sum()) for sample in alone)
    for sample in alone:
        tokens, labels = (torch.from_numpy(sample[key])[None] for key in ("tokens", "answers"))
        # transformers' own loss: a mean over the labels that are not -100, shifted by itself.
        loss = model(tokens, attention_mask=torch.ones_like(tokens), labels=labels, use_cache=False).loss
        total = total + loss * int((sample["answers"][1:] != -100).sum()) / count
    total.backward()
    for result in results:
        assert result["losses"].total == pytest.approx(total.item(), rel=1e-5)
        assert result["losses"].targets == count
    gradients = join_gradients(results, read_shape(recipe.model.hf))
    for name, parameter in model.named_parameters():
        error = np.linalg.norm(gradients[name] - parameter.grad.numpy()) / np.linalg.norm(parameter.grad.numpy())
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


def token_losses_of(recipe, rows: list) -> list[np.ndarray]:
    """On a rank: the loss of every target of each micro-batch."""
    import torch

    _, [model], _, _ = build(recipe)
    with torch.no_grad():
        return [
            model(b["tokens"], b["position_ids"], labels=b["labels"], cu_seqlens=b["cu_seqlens"])[0].numpy().copy()
            for b in micro_batches(recipe, rows)
        ]


@pytest.mark.parametrize("layout", ["tp1-pp1", "cp2"])
def test_a_changed_token_changes_its_own_sample_alone(ranks, models, layout):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models("gqa"), *keys, *TIGHT, "train.micro_batch_size=3", "train.global_batch_size=6")
    rows, _ = packed(recipe, 3)
    before = ranks.run(world, token_losses_of, recipe, rows)
    bounds = rows[1]["cu_seqlens"]
    assert len(bounds) >= 4
    for sequence in range(len(bounds) - 1):
        start, stop = bounds[sequence : sequence + 2]
        changed = [{key: value.copy() for key, value in row.items()} for row in rows]
        changed[1]["tokens"][start] += 1 if changed[1]["tokens"][start] == 0 else -1
        after = ranks.run(world, token_losses_of, recipe, changed)
        # Where its tokens stand among the three rows, in the shares of all ranks.
        inside = np.zeros(3 * len(rows[0]["tokens"]), dtype=np.float32)
        inside[48 + start : 48 + stop] = 1
        marks = [{**row, "loss_weights": part} for row, part in zip(rows, np.split(inside, 3), strict=True)]
        mine = ranks.run(world, weights_of, recipe, marks)
        for was, now, own in zip(before, after, mine, strict=True):
            assert (was[0][~own] == now[0][~own]).all()
        assert any((was[0][own] != now[0][own]).any() for was, now, own in zip(before, after, mine, strict=True))


def weights_of(recipe, rows: list) -> np.ndarray:
    """On a rank: which tokens of its micro-batch have a weight."""
    from endprompt_megatron.distributed import runtime

    p = recipe.parallel
    runtime.start(p.tensor, p.pipeline, p.virtual_pipeline, p.context, recipe.train.seed)
    return micro_batches(recipe, rows)[0]["loss_weights"][0].numpy() > 0
