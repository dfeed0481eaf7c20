"""docs/extending.md: a position map and a recipe key declared outside the package appear wherever they should."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from small import ROOT

from endprompt_megatron.checkpoint.resume import refuse_other_recipe
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.generated_tables import with_table
from endprompt_megatron.config import key_table
from endprompt_megatron.config.constraints.check import check_for
from endprompt_megatron.config.keys import entry, get, keys_of, section
from endprompt_megatron.config.load import load_recipe, recipe_of
from endprompt_megatron.config.recipe import Context, Recipe, Train
from endprompt_megatron.convert.model_card import model_card
from endprompt_megatron.data.samples.builder import SampleBuilder, SampleSpec
from endprompt_megatron.data.samples.terminal_segments import coverage_of, positions_are_shared
from endprompt_megatron.distributed.hardware import of_kind
from endprompt_megatron.method import map_table
from endprompt_megatron.method.positions import MAPS, PositionMap, Sample
from endprompt_megatron.model.published_shapes import published_config
from endprompt_megatron.model.shape import shape_of
from endprompt_megatron.plan.plan import make_plan
from endprompt_megatron.plan.plan_page import page
from endprompt_megatron.report.models import Measured
from endprompt_megatron.report.run_files import Run, Runs
from endprompt_megatron.report.sections.distance_coverage import distance_coverage

SHAPE = shape_of(published_config("Meta-Llama-3-8B"), "config")
RECIPE = """
model: {hf: Meta-Llama-3-8B}
context: {method: toy, original: 8192, target: 65536, physical: 8192}
data: {train: train}
train: {steps: 100}
parallel: {tensor: 2, sequence: true}
checkpoint: {dir: run}
"""


def toy(s: Sample, stride: int = 2) -> np.ndarray:
    """The prompt stands a part of the way to the end of the window."""
    return s.prompt_moved(s.room // stride)


@dataclass
class ToyContext(Context):
    stride: int = entry(2, "part of the way that the prompt goes", minimum=2, fixed=True)


@dataclass
class ToyTrain(Train):
    toys: str = entry("few", "how many toys there are", choices={"few": "at most three", "many": ""}, fixed=True)


@dataclass
class ToyRecipe(Recipe):
    context: ToyContext = section(ToyContext)
    train: ToyTrain = section(ToyTrain)


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A directory with a recipe of the toy map, which is declared for this test."""
    monkeypatch.setitem(MAPS, "toy", PositionMap("toy", "Toy title", "Toy summary", toy, "the same", "halfway"))
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_toy_map_is_a_legal_method_and_unknown_ones_are_answered_with_it(ground):
    recipe = load_recipe("recipe.yaml", [], ToyRecipe)
    check_for(recipe, "recipe.yaml", SHAPE, world_size=2, hardware=of_kind("h100"))
    assert recipe.context.knobs == {"stride": 2}
    with pytest.raises(InputError, match=r"context\.method=doll should be one of end_prompt, .*, toy$"):
        load_recipe("recipe.yaml", ["context.method=doll"])


def test_toy_map_places_samples_and_is_covered(ground):
    recipe = load_recipe("recipe.yaml", ["context.stride=7"], ToyRecipe)
    built = SampleBuilder(SampleSpec("toy", 64, 512, [[1, 2, 3, 4]], 1.0, 7, knobs=recipe.context.knobs))
    positions = built.build(np.arange(60), 0)["position_ids"].tolist()
    assert positions == [*range(60), *range(60 + 448 // 7, 64 + 448 // 7)]
    counted = coverage_of(recipe, prompt_len=12)
    step = (65536 - 8192) // 7
    assert counted.supervised == [(0, 8179), (step + 1, step + 8191)]
    assert positions_are_shared(recipe)


def test_toy_map_is_named_on_the_planners_page_and_the_model_card(ground):
    recipe = load_recipe("recipe.yaml", [], ToyRecipe)
    plan = make_plan(recipe, "recipe.yaml", SHAPE, of_kind("h100"), 8)
    assert "8,192 -> 65,536 tokens by Toy title" in page(plan)
    manifest = {"recipe": recipe.as_dict(), "source": "hf", "step": 1, "consumed_samples": 64}
    assert "| Method | Toy summary |" in model_card(manifest, SHAPE, "bfloat16")


def test_toy_map_is_counted_in_the_report_and_its_control_asked_for(ground):
    from endprompt_megatron.report.limits import not_shown

    run = Run(ground, "toy", recipe=recipe_of({"context": {"method": "toy"}, "train": {"steps": 1}}).as_dict())
    found = distance_coverage(run)
    assert found.prompts
    assert not found.drawn
    [points] = not_shown(Runs([run]), Measured([])).blocks
    assert any("no control was given" in point for point in points.items)


def test_toy_map_has_a_row_in_the_docs_tables(ground):
    assert "| `toy` | the same | halfway | alike | `stride` |" in map_table.map_table()
    assert "`toy`" in key_table.key_table()


def test_toy_key_is_read_checked_and_written(ground):
    recipe = load_recipe("recipe.yaml", ["train.toys=many", "context.stride=3"], ToyRecipe)
    assert (get(recipe, "train.toys"), get(recipe.as_dict(), "context.stride")) == ("many", 3)
    Path("again.yaml").write_text(recipe.as_yaml())
    assert load_recipe("again.yaml", [], ToyRecipe) == recipe
    with pytest.raises(InputError, match=r"recipe\.yaml: context\.stride=1 should be at least 2"):
        load_recipe("recipe.yaml", ["context.stride=1"], ToyRecipe)
    with pytest.raises(InputError, match=r"recipe\.yaml: train\.toys=some should be one of few, many"):
        load_recipe("recipe.yaml", ["train.toys=some"], ToyRecipe)


def test_toy_key_is_among_those_that_an_unknown_one_is_answered_with(ground):
    with pytest.raises(InputError, match=r"unknown key train\.doll; train takes global_batch_size, .*, toys$"):
        load_recipe("recipe.yaml", ["train.doll=1"], ToyRecipe)


def test_toy_key_is_kept_by_a_resumed_run(ground):
    recipe = load_recipe("recipe.yaml", ["train.toys=many"], ToyRecipe)
    refuse_other_recipe(recipe.as_dict(), recipe, "recipe.yaml", Path("iter_1"))
    with pytest.raises(InputError, match=r"train\.toys=many but iter_1 was trained with few"):
        refuse_other_recipe(load_recipe("recipe.yaml").as_dict(), recipe, "recipe.yaml", Path("iter_1"))


def test_toy_key_has_a_row_in_the_docs_table():
    table = key_table.key_table(ToyRecipe)
    row = "| `train.toys` | `few` | fixed | how many toys there are. One of `few` (at most three), `many` |"
    assert row in table.splitlines()


@pytest.mark.parametrize(
    ("name", "module", "table"),
    [("recipes", key_table.MODULE, key_table.key_table), ("methods", map_table.MODULE, map_table.map_table)],
)
def test_docs_table_is_what_the_declarations_give(name, module, table):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    assert with_table(text, module, table()) == text, f"run python -m {module} docs/{name}.md"


def test_every_recipe_key_has_a_meaning_and_a_default_that_is_legal():
    for declared in keys_of(Recipe):
        assert declared.key.meaning, declared.dotted
        declared.key.check("default", declared.dotted, declared.default)


def test_field_that_is_not_declared_as_a_key_is_refused():
    @dataclass
    class Bare(Train):
        bare: int = 1

    with pytest.raises(TypeError, match=r"Bare\.bare should be declared by entry\(\) or section\(\)"):
        list(keys_of(Bare))
