"""The recipes that come with the project are legal and fit on what their comments say."""

import pytest
from small import ROOT

from endprompt_megatron.config.constraints.check import check_for
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.distributed.hardware import of_kind
from endprompt_megatron.model.published_shapes import published_config
from endprompt_megatron.model.shape import shape_of
from endprompt_megatron.plan.estimate import estimate

H100 = of_kind("h100")

# What the comments of the recipes say they run on.
RECIPES = {
    "llama2_7b_32k": 8,
    "llama3_8b_64k": 8,
    "llama3_8b_128k": 8,
    "mistral_7b_64k": 8,
    "llama3_70b_64k": 64,
    "llama31_70b_512k": 64,
    "llama31_405b_256k": 512,
    "smollm2_135m_64k": 1,
}
LLAMA3_8B_64K = (
    *("full", "log", "curriculum", "multi", "multi_recall", "recall", "pose", "yarn"),
    *("et_pose", "released", "cream", "longlora"),
)
LCEG = ("7b_32k", "7b_32k_ntk", "7b_32k_dynamic", "7b_32k_yarn", "7b_64k_ntk")
METHODS = {
    **{f"llama3_8b_64k_{method}": 8 for method in LLAMA3_8B_64K},
    **{f"lceg_llama2_{name}": 8 for name in LCEG},
    **{f"{name}_32k_longlora{form}": 8 for name in ("llama2_7b", "llama3_8b") for form in ("", "_full")},
    "lceg_llama3_8b_64k": 8,
    "llama3_8b_32k_full": 8,
    "smollm2_135m_16k_full": 1,
}
PLAIN_ROPE = ("llama2_7b_32k", "llama3_8b_64k", "llama3_70b_64k", "mistral_7b_64k")
RECOMMENDED = {f"{name}_recommended": RECIPES[name] for name in PLAIN_ROPE}
SFT = {"llama3_8b_64k_sft": 8, "llama3_8b_64k_fp8_attention": 8}
EVERY_RECIPE = {f"{name}{twin}": gpus for name, gpus in RECIPES.items() for twin in ("", "_fp8")}
EVERY_RECIPE |= METHODS | RECOMMENDED


@pytest.mark.parametrize("name", [*EVERY_RECIPE, *SFT])
def test_recipe_that_comes_with_the_project_is_legal_and_fits(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    shape = shape_of(published_config(recipe.model.hf), name)
    gpus = {**EVERY_RECIPE, **SFT}[name]
    check_for(recipe, name, shape, world_size=gpus, hardware=H100)
    planned = estimate(shape, recipe, H100.gpu, gpus)
    assert planned.fits, [stage.total for stage in planned.stages]


@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommended_recipe_is_the_published_one_with_yarn_and_a_falling_rate(name):
    published, ours = (
        load_recipe(ROOT / "recipes" / f"{stem}.yaml").as_dict() for stem in (name.removesuffix("_recommended"), name)
    )
    published["context"]["rope"]["type"], published["optim"]["schedule"] = "yarn", "cosine"
    published["checkpoint"]["dir"] += "_recommended"
    assert ours == published


@pytest.mark.parametrize("name", RECIPES)
def test_fp8_twin_differs_in_precision_and_layout_alone(name):
    twins = [load_recipe(ROOT / "recipes" / f"{name}{twin}.yaml").as_dict() for twin in ("", "_fp8")]
    differing = {section for section in twins[0] if twins[0][section] != twins[1][section]}
    assert differing <= {"precision", "parallel", "checkpoint"}
    assert twins[1]["precision"]["fp8"] == "hybrid"
    assert {**twins[0]["checkpoint"], "dir": ""} == {**twins[1]["checkpoint"], "dir": ""}


def test_every_recipe_file_is_in_these_tables():
    files = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert files == {*EVERY_RECIPE, "smollm2_135m_demo", *SFT}
