"""Loss and every gradient equal Hugging Face's LLaMA, given the same tokens and position ids.

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
    SHAPES,
    every_target,
    losses_and_gradients_of_each,
    make_samples,
    recipe_for,
)
from parallel.reference import (
    EXACT,
    assert_equal,
    compare,
    compare_float32,
    huggingface_model,
    reference,
)

from endprompt_megatron.model.shape import read_shape

RECALL = ["context.recall={tokens: 8, key: 3}"]
METHODS = {
    "end_prompt": [],
    "random": ["context.method=end_prompt_random"],
    "end_prompt_pose": ["context.method=end_prompt_pose"],
    "pose": ["context.method=pose"],
    "full": ["context.method=full", "context.physical=256"],
    "short": ["context.method=short"],
    "log": ["context.method=end_prompt_log"],
    "curriculum": ["context.method=end_prompt_curriculum", "context.curriculum_samples=6"],
    "multi": ["context.method=end_prompt_multi", "context.anchors=3"],
    "recall": RECALL,
    "recall-near": [*RECALL, "context.method=end_prompt_near"],
    "recall-multi": [*RECALL, "context.method=end_prompt_multi", "context.anchors=2"],
}
ROPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "none")
AXES = {
    "layout": LAYOUTS,
    "method": METHODS,
    "shape": SHAPES,
    "rope": ROPES,
    "rows": ("one-row", "two-rows", "three-rows"),  # of a micro-batch
    "recompute": RECOMPUTE,
}
# What the covering set takes of the two long axes: each has a part that no other has.  The rest is the product's.
COVERED = {
    "method": ("end_prompt", "random", "pose", "full", "short", "recall", "recall-multi"),
    "shape": ("gqa", "six-layers", "mha", "odd-vocab", "odd-vocab-tied", "qwen2-tied", "qwen3", "mlp-bias-mha"),
}
ROWS = {"one-row": 1, "two-rows": 2, "three-rows": 3}


PIECES = {"pp2": 2, "pp2-vpp2": 4, "tp2-pp2-sp": 2, "cp2-pp2": 2, "pp2-dp2-overlap": 2}  # of the layers, alike


def allowed(case: Case) -> bool:
    """Dynamic frequencies follow the longest input of a micro-batch, which ranks of a context would not agree on, and
    beside which a shorter row has others than alone.  A stage has whole layers, and whole units of recompute.
    """
    if case["rope"] == "dynamic" and (case["layout"].startswith("cp") or case["rows"] != "one-row"):
        return False
    unit = 2 if case["recompute"] == "full-by-two" else 1
    if case["layout"] == "pp3-uneven":  # one layer, two, one
        return case["shape"] != "six-layers" and unit == 1
    layers = 6 if case["shape"] == "six-layers" else 4
    return layers % (unit * PIECES.get(case["layout"], 1)) == 0


def prepared(models, case: Case, count: int = 8):
    """Ranks, recipe and `count` samples of a case."""
    world, keys = LAYOUTS[case["layout"]]
    rows = ROWS[case["rows"]]
    count = 6 if rows == 3 else count
    sizes = [f"train.micro_batch_size={rows}", f"train.global_batch_size={count}"]
    keys = [*keys, *METHODS[case["method"]], *RECOMPUTE[case["recompute"]], *sizes]
    recipe = recipe_for(*models(case["shape"]), *keys, f"context.rope.type={case['rope']}")
    return world, recipe, make_samples(recipe, read_shape(recipe.model.hf).vocab_size, count)


@pytest.mark.parametrize("case", covering({**AXES, **COVERED}, allowed), ids=named)
def test_gradients_equal_huggingface(ranks, models, case):
    world, recipe, samples = prepared(models, case)
    compare(ranks, world, recipe, samples, samples)


PLAIN = {"method": "end_prompt", "shape": "gqa", "rope": "linear", "rows": "one-row", "recompute": "kept"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_gradients_are_as_exact_as_those_of_huggingface(ranks, models, layout):
    world, recipe, samples = prepared(models, {"layout": layout, **PLAIN})
    compare_float32(ranks, world, recipe, samples, samples)


MOVE_TEXT = {
    "anchor": ["context.method=end_prompt_anchor", "context.anchor_tokens=9"],
    "cream": ["context.method=cream"],
}


@pytest.mark.parametrize(
    "layout", ["tp2-pp2-sp", *(pytest.param(name, marks=pytest.mark.full) for name in ("tp1-pp1", "cp2"))]
)
@pytest.mark.parametrize("method", MOVE_TEXT)
def test_gradients_of_maps_that_move_text_equal_huggingface(ranks, models, method, layout):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models("gqa"), *keys, *MOVE_TEXT[method])
    samples = make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8)
    compare(ranks, world, recipe, samples, samples)


def test_gradients_equal_huggingface_in_uneven_virtual_stages(ranks, models):
    """Six layers, the embedding and the loss: eight in four pieces, of which the first and the last hold one layer."""
    keys = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
    keys += ["parallel.count_embedding=true", "parallel.count_loss=true"]
    recipe = recipe_for(*models("six-layers"), *keys)
    samples = make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8)
    compare(ranks, 2, recipe, samples, samples)


@pytest.fixture(scope="module")
def expected():
    """References in float64, each once for all the layouts that come one after the other."""
    made = {}

    def get(key, *args):
        if key not in made:
            if len(made) >= len(METHODS):
                made.clear()
            made[key] = in_float64(reference, *args)
        return made[key]

    return get


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_every_method_equal_huggingface(ranks, models, expected, shape, rope, layout):
    """The product of all methods, models, ropes and layouts; rows of a micro-batch and recompute take turns.

    Four samples, the fewest that every layout can take: some 12,000 combinations are most of what --all takes.
    """
    turn = list(SHAPES).index(shape) + list(ROPES).index(rope) + list(LAYOUTS).index(layout)
    which = {"layout": layout, "shape": shape, "rope": rope, "recompute": list(RECOMPUTE)[turn % len(RECOMPUTE)]}
    rows = "one-row" if rope == "dynamic" else ("one-row", "two-rows")[turn % 2]
    if not allowed({**which, "rows": rows}):
        pytest.skip("refused, or in stages of its own")
    cases = {method: prepared(models, {**which, "method": method, "rows": rows}, 4) for method in METHODS}
    world, recipe, _ = cases["end_prompt"]
    batches = [(own, samples) for _, own, samples in cases.values()]
    results = ranks.run(world, in_float64, losses_and_gradients_of_each, recipe, batches)
    for number, (method, (_, own, samples)) in enumerate(cases.items()):
        assert_equal([rank[number] for rank in results], own, expected((shape, rope, method), own, samples))


@pytest.mark.parametrize("layout", ["tp1-pp1", "pp2-vpp2", "tp2-pp2-sp"])
def test_every_target_is_scored_as_huggingface_scores_it(ranks, models, layout):
    """What the virtual-distance probe reads during training, with a vocabulary that is padded inside."""
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models("odd-vocab"), *keys)
    samples = make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 4)
    logits = in_float64(logits_of, recipe, samples)
    samples["labels"][:, ::2] = logits.argmax(-1).numpy()[:, ::2]  # random targets are hardly ever the likeliest
    labels = torch.from_numpy(samples["labels"])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").numpy()
    right = (logits.argmax(-1) == labels).numpy()

    results = ranks.run(world, in_float64, every_target, recipe, samples)
    found = [result for result in results if result is not None]
    assert len(found) == recipe.parallel.tensor
    for ours, correct in found:
        np.testing.assert_allclose(ours, losses, rtol=EXACT)
        assert (correct == right).all()


def logits_of(recipe, samples) -> torch.Tensor:
    """transformers' logits [b, s, v] of samples."""
    tokens, positions = (torch.from_numpy(samples[key]) for key in ("tokens", "position_ids"))
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        return huggingface_model(recipe)(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
