"""A study that is run for real, and killed: the tools, on a model of four layers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import ROOT, assert_one_line_error, run_tool
from unit.studying import write_study

STUDY = """
base: recipe.yaml
out: study
axes: {method: {short: {context.method: short}}, seed: [1]}
overrides: {train.steps: 4, checkpoint.interval: 2, optim.warmup_steps: 1, checkpoint.keep: 1}
untrained: {interpolated: {context.rope.type: linear}}
evaluation: {suite: [perplexity, recall], lengths: [128], scored: 16, samples: 4, text: train, dtype: float32,
  recall_distances: [90], recall_form: form.json, beyond_window: true}
reference: short
keep: scores
"""
FORM = {"fact": " it {key} {value}", "question": " it {key}", "keys": ["who"], "key_words": 1, "values": ["up", "one"]}


def tool(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "study.py"), "study.yaml", *arguments]


def study(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(tool(directory, *arguments), cwd=directory, capture_output=True, text=True)


def found(directory: Path) -> dict:
    """study.json without what things cost."""
    comparison = json.loads((directory / "study" / "study.json").read_text())
    for row in comparison["rows"]:
        assert row.pop("cost")["seconds"]
    return comparison


@pytest.fixture(scope="module")
def grounds(tmp_path_factory, ground) -> Path:
    import shutil

    root = tmp_path_factory.mktemp("studies")
    for name in ("whole", "killed"):
        shutil.copytree(ground, root / name)
        write_study(root / name, STUDY)
        (root / name / "form.json").write_text(json.dumps(FORM | {"value_words": 2}))
        (root / name / "recipe.yaml").write_text((ground / "recipe.yaml").read_text() + "\n")
    return root


@pytest.fixture(scope="module")
def whole(grounds) -> Path:
    """A study that nobody stopped."""
    done = study(grounds / "whole")
    assert done.returncode == 0, done.stderr + done.stdout
    return grounds / "whole"


def test_a_study_trains_exports_and_evaluates_each_trial_and_keeps_the_scores(whole):
    cell = whole / "study" / "cells" / "short-seed1"
    state = json.loads((cell / "cell.json").read_text())
    assert list(state["stages"]) == ["train", "export", "evaluate"]
    assert state["cost"]["tokens"] == 4 * 8 * 64
    assert state["cost"]["memory_gib"] > 0
    assert (cell / "run" / "metrics.jsonl").is_file()
    assert not (cell / "hf").exists()
    assert not (cell / "run" / "checkpoints").exists()
    comparison = found(whole)
    assert [row["name"] for row in comparison["rows"]] == ["interpolated", "short"]
    assert comparison["missing"] == []
    scores = {(s["suite"], s["task"], s["metric"]) for s in comparison["rows"][1]["scores"]}
    assert {("recall", "90", "recalled"), ("perplexity", "by_length", "loss")} <= scores
    assert comparison["rows"][0]["differences"]


@pytest.mark.full
def test_study_killed_in_every_stage_ends_with_the_same_comparison(grounds, whole):
    directory = grounds / "killed"
    cell = directory / "study" / "cells" / "short-seed1"
    for stage in ("train", "export", "evaluate"):
        runner = subprocess.Popen(tool(directory), cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Somewhere within the stage; training with its first checkpoint behind it.
        sign = cell / "run" / "checkpoints" / "iter_0000002" if stage == "train" else cell / f"{stage}.log"
        while not sign.exists():
            assert runner.poll() is None
            time.sleep(0.02)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        assert not (directory / "study" / "study.json").exists()
    done = study(directory)
    assert done.returncode == 0, done.stderr + done.stdout
    assert found(directory) == found(whole)
    steps = [json.loads(line)["step"] for line in (cell / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step] == [1, 2, 3, 4]


def test_finished_trials_are_not_run_again_and_changed_ones_are_refused(whole):
    cell = whole / "study" / "cells" / "short-seed1"
    before = (cell / "cell.json").read_bytes()
    done = study(whole)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 trials are already done" in done.stdout
    assert (cell / "cell.json").read_bytes() == before
    write_study(whole, STUDY, **{"checkpoint.keep: 1": "checkpoint.keep: 1, optim.lr: 0.5"})
    try:
        assert_one_line_error(
            study(whole), "trial interpolated was run with optim.lr=2e-05, which is now 0.5", "--again"
        )
        write_study(whole, STUDY, **{"scored: 16": "scored: 24"})
        needles = (
            "trial short-seed1 was evaluated with scored=16, which is now 24",
            "keep: scores has removed its model",
        )
        assert_one_line_error(study(whole), *needles)
        assert (cell / "cell.json").read_bytes() == before
    finally:
        write_study(whole, STUDY)


def test_study_ends_with_75_on_a_signal_and_with_one_line_on_wrong_input_of_a_stage(grounds):
    directory = grounds / "killed"
    text = STUDY.replace("out: study", "out: other").replace("text: train", "text: none")
    write_study(directory, text)
    runner = subprocess.Popen(tool(directory, "--only", "short"), cwd=directory, stderr=subprocess.PIPE, text=True)
    log = directory / "other" / "cells" / "short-seed1" / "train.log"
    while not log.exists():
        assert runner.poll() is None
        time.sleep(0.02)
    os.kill(runner.pid, signal.SIGTERM)
    _, said = runner.communicate()
    assert (runner.returncode, said) == (75, "stopped early; the same command resumes\n")
    assert_one_line_error(
        study(directory, "--only", "interpolated"), "trial interpolated evaluate: --text none: no such"
    )


def test_study_tool_has_help():
    said = run_tool("study", "--help")
    assert said.returncode == 0
    assert "--report-only" in said.stdout
