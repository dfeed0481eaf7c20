"""Loss and every gradient equal Hugging Face's LLaMA, given the same tokens and position ids, in float32."""

import numpy as np
import pytest
from parallel.cases import LAYOUTS, SHAPES, compare, every_target, huggingface_model, make_samples, recipe_for

from endprompt_megatron.model.shape import read_shape

UNEVEN = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.count_embedding=true"]
METHODS = ("end_prompt", "end_prompt_random", "end_prompt_pose", "pose", "full", "short")
RECALL = ["context.recall={tokens: 8, key: 3}"]
CANDIDATES = {
    "log": ["context.method=end_prompt_log"],
    "curriculum": ["context.method=end_prompt_curriculum", "context.curriculum_samples=6"],
    "multi": ["context.method=end_prompt_multi", "context.anchors=3"],
    "recall": RECALL,
    "recall-near": [*RECALL, "context.method=end_prompt_near"],
    "recall-multi": [*RECALL, "context.method=end_prompt_multi", "context.anchors=2"],
}
ROPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "none")


def check(ranks, models, shape_name, layout, *overrides, rows=8):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models(shape_name), *keys, *overrides)
    samples = make_samples(recipe, read_shape(recipe.model.hf).vocab_size, rows)
    compare(ranks, world, recipe, samples, samples)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_huggingface_in_layout(ranks, models, layout):
    check(ranks, models, "gqa", layout)


def test_gradients_equal_huggingface_in_uneven_virtual_stages(ranks, models):
    """Six layers, the embedding and the loss: eight in four pieces, of which the first and the last hold one layer."""
    check(ranks, models, "six-layers", "pp2", *UNEVEN, "parallel.count_loss=true")


@pytest.mark.parametrize("layout", ["cp2", "cp4"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_huggingface_under_context_parallelism_with_method(ranks, models, layout, method):
    overrides = [f"context.method={method}"] + (["context.physical=256"] if method == "full" else [])
    check(ranks, models, "gqa", layout, *overrides, "train.micro_batch_size=2")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_huggingface_with_method(ranks, models, method):
    overrides = [f"context.method={method}"] + (["context.physical=256"] if method == "full" else [])
    check(ranks, models, "gqa", "tp2-pp2-sp", *overrides)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_gradients_equal_huggingface_with_candidate(ranks, models, candidate):
    check(ranks, models, "gqa", "cp2", *CANDIDATES[candidate], "train.micro_batch_size=2")


@pytest.mark.parametrize("candidate", ["recall-multi"])
def test_gradients_equal_huggingface_with_candidate_on_four_ranks(ranks, models, candidate):
    check(ranks, models, "gqa", "tp2-pp2-sp", *CANDIDATES[candidate])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("layout", ["tp1-pp1", "pp2"])
def test_gradients_equal_huggingface_with_rope(ranks, models, rope, layout):
    check(ranks, models, "gqa", layout, f"context.rope.type={rope}")


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "gqa"])
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp2-sp"])
def test_gradients_equal_huggingface_with_shape(ranks, models, shape, layout):
    check(ranks, models, shape, layout)


@pytest.mark.parametrize("layout", ["tp1-pp1", "pp2", "tp2-pp2-sp"])
def test_gradients_equal_huggingface_with_micro_batch_of_three(ranks, models, layout):
    check(
        ranks,
        models,
        "gqa",
        layout,
        "train.micro_batch_size=3",
        "train.global_batch_size=6",
        "context.method=end_prompt_random",
        rows=6,
    )


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp2-sp"])
def test_gradients_equal_huggingface_with_recompute(ranks, models, recompute, layout):
    check(ranks, models, "gqa", layout, f"parallel.recompute={recompute}", "train.micro_batch_size=2")


@pytest.mark.parametrize("layout", ["tp1-pp1", "pp2-vpp2", "tp2-pp2-sp"])
def test_every_target_is_scored_as_huggingface_scores_it(ranks, models, layout):
    """What the virtual-distance probe reads during training, with a vocabulary that is padded inside."""
    import torch

    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models("odd-vocab"), *keys)
    samples = make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 4)
    tokens, positions = (torch.from_numpy(samples[key]) for key in ("tokens", "position_ids"))
    with torch.no_grad():
        model = huggingface_model(recipe)
        logits = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    samples["labels"][:, ::2] = logits.argmax(-1).numpy()[:, ::2]  # random targets are hardly ever the likeliest
    labels = torch.from_numpy(samples["labels"])
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").numpy()
    right = (logits.argmax(-1) == labels).numpy()

    found = [result for result in ranks.run(world, every_target, recipe, samples) if result is not None]
    assert len(found) == recipe.parallel.tensor
    for losses, correct in found:
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
        assert (correct == right).all()
