"""Loss and every gradient equal Hugging Face's LLaMA, given the same tokens and position ids, in float32."""

import numpy as np
import pytest
from parallel.cases import (
    every_target,
    huggingface_loss,
    huggingface_model,
    join_gradients,
    losses_and_gradients,
    make_samples,
    recipe_for,
)
from small import small_llama

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.shape import read_shape

SHAPES = {
    "gqa": {},
    "six-layers": {"num_hidden_layers": 6},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "odd-vocab": {"vocab_size": 321},
    "odd-vocab-tied": {"vocab_size": 321, "tie_word_embeddings": True},
    "head-dim": {"head_dim": 32},
    "mistral": {"model_type": "mistral"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias-mha": {"mlp_bias": True, "num_key_value_heads": 4},
}
LAYOUTS = {
    "tp1-pp1": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp2-dp2": (4, ["parallel.tensor=2"]),
    "tp2-pp2-sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "cp4": (4, ["parallel.context=4"]),
    "cp2-tp2-sp": (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "cp2-pp2": (4, ["parallel.context=2", "parallel.pipeline=2"]),
    "cp2-dp2": (4, ["parallel.context=2"]),
    "pp3-uneven": (3, ["parallel.pipeline=3", "parallel.count_embedding=true", "parallel.count_loss=true"]),
    "dp2-overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "pp2-dp2-overlap": (
        4,
        ["parallel.pipeline=2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
    "selective": (1, ["parallel.recompute=selective"]),
    "full-by-two": (1, ["parallel.recompute=full", "parallel.recompute_layers=2"]),
    "block": (2, ["parallel.recompute=block", "parallel.recompute_layers=1", "parallel.pipeline=2"]),
    "cp2-full": (2, ["parallel.context=2", "parallel.recompute=full"]),
}
UNEVEN = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.count_embedding=true"]
METHODS = ("end_prompt", "end_prompt_random", "end_prompt_pose", "pose", "full", "short")
ROPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "none")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Each small model once: {name: (directory, Hugging Face, Megatron)}."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            small_llama(directory / "hf", **SHAPES[name])
            convert_hf_to_megatron(directory / "hf", directory / "megatron")
            made[name] = (directory, directory / "hf", directory / "megatron")
        return made[name]

    return get


def compare(ranks, models, shape_name, layout, *overrides, rows=8):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models(shape_name), *keys, *overrides)
    shape = read_shape(recipe.model.hf)
    samples = make_samples(recipe, shape.vocab_size, rows)
    results = ranks.run(world, losses_and_gradients, recipe, samples)

    model = huggingface_model(recipe)
    total, context, prompt = huggingface_loss(model, samples)
    total.backward()
    for result in results:
        ours = result["losses"]
        assert ours.total == pytest.approx(total.item(), rel=1e-5)
        assert ours.context == pytest.approx(context, rel=1e-5)
        assert ours.prompt is prompt is None or ours.prompt == pytest.approx(prompt, rel=1e-5)
    gradients = join_gradients(results, shape)
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert set(gradients) == set(expected)
    for name, reference in expected.items():
        error = np.linalg.norm(gradients[name] - reference) / np.linalg.norm(reference)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_huggingface_in_layout(ranks, models, layout):
    compare(ranks, models, "gqa", layout)


def test_gradients_equal_huggingface_in_uneven_virtual_stages(ranks, models):
    """Six layers, the embedding and the loss: eight in four pieces, of which the first and the last hold one layer."""
    compare(ranks, models, "six-layers", "pp2", *UNEVEN, "parallel.count_loss=true")


@pytest.mark.parametrize("layout", ["cp2", "cp4"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_huggingface_under_context_parallelism_with_method(ranks, models, layout, method):
    overrides = [f"context.method={method}"] + (["context.physical=256"] if method == "full" else [])
    compare(ranks, models, "gqa", layout, *overrides, "train.micro_batch_size=2")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_huggingface_with_method(ranks, models, method):
    overrides = [f"context.method={method}"] + (["context.physical=256"] if method == "full" else [])
    compare(ranks, models, "gqa", "tp2-pp2-sp", *overrides)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("layout", ["tp1-pp1", "pp2"])
def test_gradients_equal_huggingface_with_rope(ranks, models, rope, layout):
    compare(ranks, models, "gqa", layout, f"context.rope.type={rope}")


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "gqa"])
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp2-sp"])
def test_gradients_equal_huggingface_with_shape(ranks, models, shape, layout):
    compare(ranks, models, shape, layout)


@pytest.mark.parametrize("layout", ["tp1-pp1", "pp2", "tp2-pp2-sp"])
def test_gradients_equal_huggingface_with_micro_batch_of_three(ranks, models, layout):
    compare(
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
    compare(ranks, models, "gqa", layout, f"parallel.recompute={recompute}", "train.micro_batch_size=2")


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
