"""Packed rows: loss and every gradient are those of each sample run alone through Hugging Face's LLaMA.

In float64, where both agree to the last digits.  In float32, once a layout, ours are as exact as transformers' are.
"""

import numpy as np
import pytest
import torch
from float64 import in_float64
from pairwise import Case, covering, named
from parallel.cases import (
    LAYOUTS,
    RECOMPUTE,
    build,
    losses_and_gradients,
    losses_and_gradients_of_each,
    make_packed,
    micro_batches,
    recipe_for,
)
from parallel.reference import (
    Reference,
    assert_equal,
    compare,
    compare_float32,
    huggingface_model,
    reference,
)

from endprompt_megatron.model.shape import read_shape

TIGHT = ["data.packing=documents", "context.physical=48"]
METHODS = ("end_prompt", "end_prompt_random", "end_prompt_pose", "pose", "short")
ROPES = ("linear", "ntk", "yarn", "llama3", "none")
ROWS = {"one-row": 1, "two-rows": 2, "three-rows": 3}
ALIGN = {"tight": [], "aligned-16": ["data.align=16"]}
AXES = {
    "layout": [name for name in LAYOUTS if name not in ("tp2-sp", "pp3-uneven", "dp2-overlap", "pp2-dp2-overlap")],
    "method": METHODS,
    "rope": ROPES,
    "rows": ROWS,  # of a micro-batch
    "recompute": ("kept", "selective", "full"),
    "align": ALIGN,
    "shape": ("gqa", "mha", "odd-vocab-tied", "attention-bias"),
}
COVERED = {"method": ("end_prompt", "pose", "short"), "rope": ("linear", "ntk", "yarn", "llama3")}  # the rest: --all


def packed(recipe, rows):
    return make_packed(recipe, read_shape(recipe.model.hf).vocab_size, rows)


def prepared(models, case: Case):
    """Ranks and recipe of a case, its packed rows and the samples alone."""
    world, keys = LAYOUTS[case["layout"]]
    rows = ROWS[case["rows"]]
    sizes = [f"train.micro_batch_size={rows}", f"train.global_batch_size={4 * rows}"]
    keys = [*keys, *TIGHT, *sizes, *RECOMPUTE[case["recompute"]], *ALIGN[case["align"]]]
    what = [f"context.method={case['method']}", f"context.rope.type={case['rope']}"]
    recipe = recipe_for(*models(case["shape"]), *keys, *what)
    return world, recipe, *packed(recipe, 4 * rows)


@pytest.mark.parametrize("case", covering({**AXES, **COVERED}), ids=named)
def test_packed_rows_equal_samples_alone(ranks, models, case):
    compare(ranks, *prepared(models, case))


PLAIN = dict(method="end_prompt", rope="linear", rows="two-rows", recompute="kept", align="tight", shape="gqa")


@pytest.mark.parametrize("layout", AXES["layout"])
def test_packed_rows_in_float32_are_as_exact_as_samples_alone(ranks, models, layout):
    compare_float32(ranks, *prepared(models, {"layout": layout, **PLAIN}))


@pytest.mark.full
@pytest.mark.parametrize("layout", AXES["layout"])
@pytest.mark.parametrize("rope", ROPES)
def test_packed_rows_of_every_method_and_size_equal_samples_alone(ranks, models, rope, layout):
    """The product of all methods, rows of a micro-batch, RoPE types and layouts; the rest takes turns."""
    turn = ROPES.index(rope) + AXES["layout"].index(layout)
    rest = {name: list(AXES[name])[turn % len(AXES[name])] for name in ("recompute", "align", "shape")}
    cases = [
        prepared(models, {"layout": layout, "method": method, "rope": rope, "rows": rows, **rest})
        for method in METHODS
        for rows in ROWS
    ]
    world, recipe, _, _ = cases[0]
    batches = [(own, given) for _, own, given, _ in cases]
    results = ranks.run(world, in_float64, losses_and_gradients_of_each, recipe, batches)
    for number, (_, own, _, alone) in enumerate(cases):
        assert_equal([rank[number] for rank in results], own, in_float64(reference, own, alone))


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
    results = ranks.run(world, in_float64, losses_and_gradients, recipe, rows)
    expected, count = in_float64(answers_alone, recipe, alone)
    assert_equal(results, recipe, expected)
    assert {result["losses"].targets for result in results} == {count}


def answers_alone(recipe, alone) -> tuple[Reference, int]:
    """By transformers' own loss: a mean over the labels that are not -100, which it shifts itself."""
    model = huggingface_model(recipe)
    total, count = 0.0, sum(int((sample["answers"][1:] != -100).sum()) for sample in alone)
    for sample in alone:
        tokens, labels = (torch.from_numpy(sample[key])[None] for key in ("tokens", "answers"))
        loss = model(tokens, attention_mask=torch.ones_like(tokens), labels=labels, use_cache=False).loss
        total = total + loss * int((sample["answers"][1:] != -100).sum()) / count
    total.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return Reference(total.item(), total.item(), None, np.empty(0), gradients), count


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
