"""A study.yaml as it is read: the trials, equal tokens, one line for what is wrong, and what --slurm would submit."""

import subprocess

import pytest
import yaml
from small import ROOT, assert_one_line_error, run_tool
from unit.starting import RECIPE
from unit.studying import STUDY, write_study

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.study.grid import read_study


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A directory with a recipe, of a model that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def study(bare):
    return read_study(write_study(bare))


def test_study_grid_has_every_combination_one_seed_after_the_other(study):
    names = [trial.name for trial in study.trials]
    variants = ["short-linear", "short-yarn", "full-linear", "end_prompt-linear", "end_prompt-yarn"]
    assert names == ["base", "interpolated", *(f"{variant}-seed{seed}" for seed in (1, 2, 3) for variant in variants)]
    assert study.variants == ["base", "interpolated", *variants]
    assert [trial.name for trial in study.chosen(["full-linear", "base", "short-yarn-seed2"])] == [
        *("base", "full-linear-seed1", "short-yarn-seed2", "full-linear-seed2", "full-linear-seed3")
    ]


def test_trial_recipe_is_its_levels_over_shared_overrides_over_the_base(study):
    trial = study.chosen(["end_prompt-yarn-seed2"])[0]
    recipe = trial.recipe
    assert (recipe.context.method, recipe.context.rope.type, recipe.train.seed) == ("end_prompt", "yarn", 2)
    assert (recipe.train.tokens, recipe.train.steps, recipe.optim.warmup_steps) == (4096, 8, 1)
    assert recipe.run_dir == study.directory(trial) / "run"
    assert trial.levels == {"method": "end_prompt", "rope": "yarn", "seed": "seed2"}
    base, interpolated = study.trials[:2]
    assert base.recipe is None
    assert (interpolated.recipe.context.rope.type, interpolated.trained) == ("linear", False)


def test_trained_trials_get_equal_tokens_though_full_is_physically_longer(study):
    tokens = {trial.tokens for trial in study.trials if trial.trained}
    assert tokens == {4096}
    physical = {trial.variant: trial.recipe.context.physical for trial in study.trials if trial.trained}
    assert (physical["full-linear"], physical["short-linear"]) == (256, 64)


def test_study_budgets_may_differ_by_less_than_one_global_batch(bare):
    text = STUDY.replace("train.tokens: 4096", "train.tokens: 4100").replace(
        "global_batch_size: 2", "global_batch_size: 3"
    )
    tokens = {trial.tokens for trial in read_study(write_study(bare, text)).trials if trial.trained}
    assert tokens == {4608}
    text = text.replace("global_batch_size: 3", "global_batch_size: 3, train.tokens: 5400")
    with pytest.raises(InputError, match=r"do not consume the same tokens: .* 4,608, .* 6,144, a global batch \(768\)"):
        read_study(write_study(bare, text))


@pytest.mark.parametrize(
    ("old", "new", "needle"),
    [
        ("base: recipe.yaml", "base: none.yaml", "none.yaml: no such recipe"),
        ("out: study\n", "", "out is missing"),
        ("title: A small study", "titel: x", "unknown key titel"),
        ("axes:", "axis:", "unknown key axis"),
        ("seed: [1, 2, 3]", "seed: {}", "axes.seed has no level"),
        ("seed: [1, 2, 3]", "seed: [1, 1.5]", "train.seed"),
        ("rope: {linear: {}, ", "rope: {li/near: {}, ", "axes.rope.li/near: a name may contain only letters"),
        ("rope: yarn}]", "rope: ntk}]", "exclude[0]: axis rope has no level ntk"),
        ("{context.rope.type: yarn}", "{context.rope.typ: yarn}", "unknown key context.rope.typ"),
        ("{context.rope.type: yarn}", "{context.rope.type: none_such}", "context.rope.type=none_such should be one of"),
        ("{context.method: short}", "short", "axes.method.short=short should be recipe keys with values"),
        ("interpolated:", "short-linear-seed1:", "untrained.short-linear-seed1: a name may contain only letters"),
        ("reference: short-linear", "reference: long", "reference=long is not a variant"),
        ("suite: [perplexity]", "suite: [perplexities]", "--suite perplexities: unknown"),
        ("scored: 16", "score: 16", "evaluation.score: tools/evaluate.py has no such option"),
        ("lengths: [64, 128], ", "", "evaluation requires suite and lengths"),
        ("reference:", "keep: some\nreference:", "keep=some should be one of all, scores"),
        ("reference:", "parallel: 0\nreference:", "parallel=0 should be a whole number, at least 1"),
        ("title:", "title: [", "not valid YAML"),
    ],
)
def test_wrong_study_yaml_is_refused_in_one_line(bare, old, new, needle):
    path = write_study(bare, **{old: new})
    with pytest.raises(InputError) as raised:
        read_study(path)
    assert "\n" not in str(raised.value)
    assert needle in str(raised.value)


def test_study_tool_lists_trials_and_refuses_unknown_names(bare):
    path = write_study(bare, **{"out: study": f"out: {bare / 'study'}"})
    listed = run_tool("study", path, "--list", "--only", "full-linear")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [f"full-linear-seed{seed}" for seed in (1, 2, 3)]
    assert "train, export, evaluate left" in lines[2]
    assert_one_line_error(
        run_tool("study", path, "--list", "--only", "ful"), "--only ful: no such trial or variant", "full-linear"
    )
    assert_one_line_error(run_tool("study", path, "--dry-run"), "--dry-run: requires --slurm")
    assert_one_line_error(run_tool("study", path, "--report-only"), "no trial is done yet")
    said = run_tool("study", path, "--slurm", "--dry-run", "--only", "full-linear")
    assert said.returncode == 0, said.stderr
    array, report = said.stdout.splitlines()
    names = ":".join(f"full-linear-seed{seed}" for seed in (1, 2, 3))
    assert f"STUDY_CELLS={names} sbatch --parsable --array=0-2 " in array
    assert "sbatch --dependency=afterany:JOB " in report
    assert not (bare / "study").exists()


def test_trial_that_cannot_train_is_refused_before_the_study_starts(place):
    (place / "recipe.yaml").write_text((place / "recipe.yaml").read_text().replace("hf: hf", f"hf: {place / 'hf'}"))
    path = write_study(place, **{"out: study": f"out: {place / 'study'}", "physical: 256": "physical: 128"})
    said = run_tool("study", path)
    assert_one_line_error(said, "trial full-linear-seed1: context.method=full trains at full length")
    assert not (place / "study").exists()


@pytest.mark.parametrize("task", [0, 1])
def test_slurm_task_runs_the_trial_of_its_number(task):
    import os

    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment |= {"STUDY": "study.yaml", "STUDY_CELLS": "short-seed1:pose-seed1", "SLURM_ARRAY_TASK_ID": str(task)}
    script = ROOT / "slurm" / "study.sh"
    said = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, env=environment)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[0].endswith(
        f"tools/study.py study.yaml --only {['short', 'pose'][task]}-seed1 --no-report"
    )
    environment["SLURM_ARRAY_TASK_ID"] = "2"
    said = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, env=environment)
    assert (said.returncode, said.stderr) == (2, "error: STUDY_CELLS names 2 trials, but this is task 2\n")
    del environment["STUDY_CELLS"]
    said = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, env=environment)
    assert said.stdout.splitlines()[0].endswith("tools/study.py study.yaml --report-only")


def test_examples_of_study_runner_page_are_valid_studies(bare):
    import re

    text = (ROOT / "docs" / "study_runner.md").read_text()
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "axes:" in block]
    assert blocks
    for block in blocks:
        keys = yaml.safe_load(block)
        assert set(keys) >= {"base", "out", "axes", "evaluation"}
        base = (
            "model: {hf: hf}\ncontext: {target: 2048, physical: 256}\ncheckpoint: {dir: x}\noptim: {warmup_steps: 1}\n"
        )
        (bare / keys["base"]).write_text(base + "train: {tokens: 65536, global_batch_size: 32}\n")
        assert read_study(write_study(bare, block)).trials
