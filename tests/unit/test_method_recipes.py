"""The recipes of the compared methods: LCEG's frequencies by its published formulas, budgets that can be compared."""

import math

import numpy as np
import pytest
from small import ROOT, scaled_config

from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.method.rope import frequencies, transformers_config
from endprompt_megatron.model.published_shapes import published_config

LCEG = sorted(path.stem for path in (ROOT / "recipes").glob("lceg_*.yaml"))
OURS = [
    f"llama3_8b_64k_{name}"
    for name in "full log curriculum multi multi_recall recall pose et_pose released cream yarn".split()
]


def recipe_of(name: str):
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


def trained(name: str) -> tuple[np.ndarray, float, float]:
    """(inverse frequencies at the length that is trained, attention factor, the model's own base)."""
    recipe = recipe_of(name)
    c, config = recipe.context, published_config(recipe.model.hf)
    exported = scaled_config(config, c.rope.type, c.rope.factor, c.original, c.target)
    inv_freq, attention_factor = frequencies(transformers_config(exported), c.physical)
    return inv_freq.double().numpy(), attention_factor, config.get("rope_theta", 10000.0)


def plain(base: float, d: int = 128) -> np.ndarray:
    return base ** (-np.arange(0, d, 2) / d)


@pytest.mark.parametrize("name", LCEG)
def test_lceg_recipes_have_its_hyper_parameters(name):
    recipe = recipe_of(name)
    c, t, o = recipe.context, recipe.train, recipe.optim
    assert (c.method, c.physical) == ("full", c.target)
    assert (t.tokens, t.global_batch_size) == (1_000_000_000, 256)
    assert (o.lr, o.warmup_steps, o.schedule, o.weight_decay) == (2e-5, 20, "constant", 0.0)
    # Its sets of 1B tokens have 30,774 sequences of 32K or 15,386 of 64K: 120 and 60 steps.
    assert t.steps == {32768: 120, 65536: 60}[c.physical]


@pytest.mark.parametrize(("name", "factor"), [("lceg_llama2_7b_32k", 8), ("lceg_llama3_8b_64k", 8)])
def test_lcegs_interpolation_divides_every_frequency(name, factor):
    inv_freq, attention_factor, base = trained(name)
    np.testing.assert_allclose(inv_freq, plain(base) / factor, rtol=1e-6)
    assert (attention_factor, base) == (1.0, 500000.0 if "llama3" in name else 10000.0)


@pytest.mark.parametrize(
    ("name", "target"),
    [("lceg_llama2_7b_32k_dynamic", 32768), ("lceg_llama2_7b_32k_ntk", 32768), ("lceg_llama2_7b_64k_ntk", 65536)],
)
def test_lcegs_ntk_has_one_base_at_full_length(name, target):
    """base' = base * a^(d / (d - 2)), a = f L / L0 - (f - 1) with f = ceil(L / 2 / L0)."""
    inv_freq, attention_factor, base = trained(name)
    f = math.ceil(target / 2 / 4096)
    a = f * target / 4096 - (f - 1)
    np.testing.assert_allclose(inv_freq, plain(base * a ** (128 / 126)), rtol=1e-5)
    assert attention_factor == 1.0


def test_lcegs_yarn_frequencies_follow_the_formula():
    """Turns r = L0 / wavelength: as they are above 32, interpolated below 1, a ramp between their dimensions."""
    inv_freq, attention_factor, base = trained("lceg_llama2_7b_32k_yarn")
    assert attention_factor == pytest.approx(0.1 * math.log(8) + 1)
    low, high = (128 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    ramp = np.clip((np.arange(64) - math.floor(low)) / (math.ceil(high) - math.floor(low)), 0, 1)
    np.testing.assert_allclose(inv_freq, plain(base) * (1 - ramp + ramp / 8), rtol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_methods_for_llama3_8b_see_as_many_tokens_in_as_many_steps_as_the_published_one(name):
    recipe, published = recipe_of(name), recipe_of("llama3_8b_64k")
    assert (recipe.tokens_per_step, recipe.train.steps) == (published.tokens_per_step, published.train.steps)
    assert (recipe.optim, recipe.context.target) == (published.optim, 65536)
