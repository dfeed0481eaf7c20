"""tools/plan.py: the page, JSON, the search, remedies that work, one-line errors."""

import contextlib
import json
import re
from dataclasses import replace

import pytest
from small import ROOT, assert_one_line_error, run_tool

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints.check import check_for
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.distributed.hardware import of_kind
from endprompt_megatron.model.published_shapes import shape_for
from endprompt_megatron.plan.plan import estimate, make_plan, min_gpus
from endprompt_megatron.plan.plan_page import WIDTH, layout_keys, page
from endprompt_megatron.plan.search import search

RECIPE = ROOT / "recipes" / "llama3_8b_64k.yaml"
SEVENTY = ["model.hf=models/Meta-Llama-3-70B", "parallel.tensor=4", "parallel.pipeline=4", "parallel.context=2"]
SEVENTY += ["parallel.virtual_pipeline=5", "parallel.sequence=true", "parallel.overlap_tensor=true"]
H100 = of_kind("h100")


def planned(*overrides: str, gpus: int | None = None, hardware=H100):
    recipe = load_recipe(RECIPE, list(overrides))
    shape, published = shape_for(recipe.model.hf, str(RECIPE))
    return make_plan(recipe, str(RECIPE), shape, hardware, gpus, published)


def test_the_page_shows_layout_memory_time_savings_and_assumptions():
    text = run_tool("plan", RECIPE, *SEVENTY, "--nodes", 8)
    assert text.returncode == 0, text.stderr
    lines = text.stdout.splitlines()
    assert len(lines) < 66
    assert max(map(len, lines)) <= WIDTH
    for words in ("8,192 -> 65,536 tokens by EndPrompt", "70.6 billion parameters", "64 H100 (8 nodes)"):
        assert words in text.stdout
    for words in ("FITS", "tensor 4 x pipeline 4 (5 virtual) x context 2 x data 2", "GPU-hours", "pipeline bubble"):
        assert words in text.stdout
    for words in ("The shape is the published one", "What is saved", "Assumed", "a checkpoint with its optimizer"):
        assert words in text.stdout
    assert sum(line.strip().startswith(("0 ", "1 ", "2 ", "3 ")) for line in lines) == 4  # one row per stage


def test_json_of_the_planner_has_the_numbers_of_the_page():
    result = run_tool("plan", RECIPE, *SEVENTY, "--nodes", 8, "--json")
    found = json.loads(result.stdout)
    plan = planned(*SEVENTY, gpus=64)
    assert found["gpu_hours"] == pytest.approx(plan.estimate.gpu_hours)
    assert found["parallel"]["data"] == 2
    assert found["micro_batches"] == 32
    assert sum(found["seconds_by_kind"].values()) == pytest.approx(found["step_seconds"], abs=1e-4)
    assert found["tokens_per_s_per_gpu"] * found["step_seconds"] * 64 == pytest.approx(64 * 8192)
    for stage in found["stages"]:
        gib = stage["gib"]
        kept = sum(gib[name] for name in ("weights", "gradients", "optimizer", "activations", "buffers"))
        assert kept + max(gib["logits"], gib["working"]) == pytest.approx(gib["allocated"], abs=0.01)
        assert gib["allocated"] + gib["overhead"] == pytest.approx(gib["total"], abs=0.01)
    assert found["full_length"]["physical"] == 65536


@pytest.mark.parametrize(
    ("overrides", "gpus"), [(SEVENTY, 64), ([], 4), (["parallel.recompute=full"], 2)], ids=["70b", "8b", "8b-recompute"]
)
def test_without_a_number_of_gpus_the_fewest_that_fit_are_planned_and_named(overrides, gpus):
    plan = planned(*overrides)
    assert plan.estimate.fits
    assert plan.estimate.gpus == gpus
    assert f"the fewest GPUs that the layout fits on, {gpus} " in " ".join(page(plan).split())
    if plan.estimate.replicas > 1:
        assert not estimate(plan.shape, plan.estimate.recipe, H100.gpu, gpus // 2).fits


def test_the_recommended_recipe_is_named_beside_a_published_one():
    plan = planned()
    assert "llama3_8b_64k_recommended.yaml" in page(plan)
    assert "our own measurements" not in page(replace(plan, where="recipes/llama3_8b_64k_recommended.yaml"))


def test_full_length_costs_about_what_its_flops_suggest():
    """Attention reaches less of the peak than matrix products do, and more of it in long sequences."""
    plan = planned(gpus=8)
    ours, full = plan.estimate, plan.full
    assert full.recipe.train.global_batch_size == ours.recipe.train.global_batch_size
    assert full.tokens == pytest.approx(ours.tokens, rel=0.01)
    assert full.fits
    slower = ours.tokens_per_gpu_second / full.tokens_per_gpu_second
    assert full.flops / ours.flops == pytest.approx(96.6 / 51.5, rel=0.01)
    assert slower == pytest.approx(full.flops / ours.flops, rel=0.05)
    assert plan.full_same_samples / ours.gpu_hours == pytest.approx(8 * slower)


@pytest.mark.parametrize(
    "keys",
    [
        ["context.recall.tokens=53"],
        ["context.retain.weight=1", "context.retain.every=100000"],
        ["context.method=pose", "context.content_skip=true"],
        ["data.packing=documents"],
    ],
    ids=["recall", "retain", "pose", "packed"],
)
def test_keys_of_the_recipes_method_do_not_hide_the_cost_of_full_length(keys):
    within = ["data.document_ends=within"] if "pose" in keys[0] else []
    plan, plain = planned(*keys, *within, gpus=8), planned(gpus=8)
    assert plan.full.step_seconds == pytest.approx(plain.full.step_seconds)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_legal_and_fits_on_some_number_of_h100s(path):
    recipe = load_recipe(path)
    shape, _ = shape_for(recipe.model.hf, str(path))
    counts = [min_gpus(recipe) * replicas for replicas in (1, 2, 4, 8, 16, 32)]
    plans = []
    for gpus in counts:
        with contextlib.suppress(InputError):  # the batch does not divide over so many replicas
            check_for(recipe, str(path), shape, world_size=gpus, hardware=H100)
            plans.append(estimate(shape, recipe, H100.gpu, gpus))
    assert any(plan.fits for plan in plans)


def test_a_full_length_recipe_is_not_compared_with_itself():
    plan = planned("context.method=full", "context.physical=65536", "parallel.context=4", gpus=8)
    assert plan.full is None
    assert "full-length training at 65,536" in page(plan)


@pytest.mark.parametrize(
    ("overrides", "least"),
    [
        (["parallel.tensor=1", "parallel.sequence=false"], 8),
        (["context.physical=32768"], None),
        ([*SEVENTY, "parallel.context=1"], 16),
    ],
    ids=["8b-tp1", "8b-32k", "70b-cp1"],
)
def test_every_proposed_remedy_makes_the_recipe_fit(overrides, least):
    plan = planned(*overrides, gpus=least)
    assert not plan.estimate.fits
    assert "DOES NOT FIT" in page(plan)
    assert plan.remedies
    for keys, given in plan.remedies:
        gpus = next((int(key.split("=")[1]) for key in keys if key.startswith("--world-size")), plan.estimate.gpus)
        recipe = load_recipe(RECIPE, [*overrides, *(key for key in keys if not key.startswith("--"))])
        check_for(recipe, "recipe", plan.shape, world_size=gpus, hardware=H100)
        again = estimate(plan.shape, recipe, H100.gpu, gpus)
        assert again.fits
        assert again.step_seconds == pytest.approx(given.step_seconds)


@pytest.mark.parametrize(("kind", "gpus"), [("h100", 8), ("h200", 8), ("a100", 16), ("b200", 8)])
def test_layouts_of_a_search_are_legal_fit_and_are_sorted(kind, gpus):
    recipe = load_recipe(RECIPE)
    shape, _ = shape_for(recipe.model.hf, "recipe")
    hardware = of_kind(kind)
    found = search(shape, recipe, hardware, gpus)
    assert found
    for one in found:
        check_for(one.recipe, "recipe", shape, world_size=gpus, hardware=hardware)
        assert one.fits
    seconds = [one.step_seconds for one in found]
    assert seconds == sorted(seconds)
    own = estimate(shape, recipe, hardware.gpu, gpus)
    assert not own.fits or seconds[0] <= own.step_seconds


def test_the_keys_that_a_search_prints_reproduce_its_layout():
    overrides = ["model.hf=models/Meta-Llama-3-70B"]
    result = run_tool("plan", RECIPE, *overrides, "--search", "--nodes", 8)
    assert result.returncode == 0, result.stderr
    keys = result.stdout.rstrip().splitlines()[-1].split()[1:]
    recipe = load_recipe(RECIPE, overrides)
    shape, _ = shape_for(recipe.model.hf, "recipe")
    best = search(shape, recipe, H100, 64)[0]
    assert keys == layout_keys(recipe, best.recipe)
    assert planned(*overrides, *keys, gpus=64).estimate.step_seconds == pytest.approx(best.step_seconds)


def test_an_existing_model_directory_is_read_instead_of_the_published_shape(tmp_path):
    directory = tmp_path / "Meta-Llama-3-8B"
    directory.mkdir()
    assert_one_line_error(run_tool("plan", RECIPE, f"model.hf={directory}"), "config.json")
    from endprompt_megatron.model.published_shapes import published_config

    (directory / "config.json").write_text(json.dumps(published_config("llama-3.2-1b")))
    model = f"model.hf={directory}"
    # What training refuses is refused here: LLaMA-3.2 has a scaling of its own.
    assert_one_line_error(run_tool("plan", RECIPE, model), "context.rope.type=linear", "own llama3 scaling")
    result = run_tool("plan", RECIPE, model, "context.rope.type=llama3", "--json")
    shape = json.loads(result.stdout)["shape"]
    assert (shape["num_layers"], shape["published"]) == (16, False)


@pytest.mark.parametrize(
    ("args", "needles"),
    [
        (["--gpu", "v100"], ["--gpu v100", "h100"]),
        (["--nodes", "0"], ["--nodes 0"]),
        (["--nodes", "1", "--world-size", "8"], ["give one of them"]),
        (["--search"], ["--nodes N"]),
        (["--disk", "0"], ["--disk 0", "GB/s"]),
        (["--world-size", "3"], ["parallel.tensor", "multiple of 2"]),
        (["parallel.tensor=3"], ["parallel.tensor=3", "use"]),
        (["model.hf=models/our-own"], ["model.hf=models/our-own", "no such directory", "llama-3-8b"]),
        (["precision.fp8=hybrid", "--gpu", "a100"], ["precision.fp8=hybrid", "A100"]),
        (["model.hf=Llama-3.1-405B", "--search", "--nodes", "1"], ["no layout of 8 H100"]),
        (["parallel.depth=3"], ["unknown key parallel.depth"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_of_the_planner_ends_in_one_line(args, needles):
    assert_one_line_error(run_tool("plan", RECIPE, *args), *needles)


@pytest.mark.parametrize("name", ["extend_8b", "extend_70b", "extend_405b"])
def test_jobs_are_signalled_as_long_before_their_limit_as_the_last_checkpoint_takes(name):
    script = (ROOT / f"slurm/{name}.sh").read_text()
    signalled = int(re.search(r"--signal=B:USR2@(\d+)", script).group(1))
    nodes = re.search(r"--nodes=(\d+)", script).group(1)
    recipe = ROOT / re.search(r"recipes/\w+\.yaml", script).group()
    planned = json.loads(run_tool("plan", recipe, "--nodes", nodes, "--json").stdout)
    assert planned["checkpoint_seconds"] == pytest.approx(planned["checkpoint_gib"] * 2**30 / 5e9)
    assert 2 * planned["checkpoint_seconds"] < planned["signal_seconds"] <= signalled
    fast = json.loads(run_tool("plan", recipe, "--nodes", nodes, "--json", "--disk", "50").stdout)
    assert fast["checkpoint_seconds"] == pytest.approx(planned["checkpoint_seconds"] / 10)
