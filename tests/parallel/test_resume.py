"""Stopped and started again, a run gives the losses of the run that was never stopped, to the last bit."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from parallel.jobs import Jobs
from parallel.reference import AS_GOOD
from small import PATIENCE, ROOT, assert_one_line_error, file_system_of, run_tool, small_llama, text

from endprompt_megatron.checkpoint.layout import complete_iterations
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

STEPS = 60


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A small model, its checkpoint, prepared text and a recipe; and the losses of the whole run."""
    directory = tmp_path_factory.mktemp("resume")
    small_llama(directory / "hf")
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    (directory / "text.txt").write_text(text(20_000))
    prepared = run_tool(
        "prepare_data",
        *("--input", directory / "text.txt", "--tokenizer", directory / "hf", "--out", directory / "train"),
    )
    assert prepared.returncode == 0, prepared.stderr
    (directory / "recipe.yaml").write_text(
        f"model: {{hf: {directory / 'hf'}, init_from: {directory / 'megatron'}}}\n"
        "context: {target: 256, physical: 48, prompts: [EP_3, EP_2], method: end_prompt_random}\n"
        f"data: {{train: {directory / 'train'}}}\n"
        f"train: {{steps: {STEPS}, global_batch_size: 4}}\n"
        "optim: {lr: 1.0e-3, warmup_steps: 2, schedule: cosine}\n"
        "checkpoint: {dir: UNSET, interval: 4}\n"
        "log: {tensorboard: false}\n"
    )
    finished = run_tool("extend", *command(directory, "whole")[2:])
    assert finished.returncode == 0, finished.stderr
    return directory


def command(directory, run, *overrides):
    arguments = [directory / "recipe.yaml", f"checkpoint.dir={directory / run}", *overrides]
    return [sys.executable, str(ROOT / "tools" / "extend.py"), *map(str, arguments)]


def metrics(directory, run):
    lines = (directory / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(directory, run):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(directory, run)]


def interrupt(jobs, directory, run, kind, step, *overrides):
    """Start a run that gets this signal while it is in that step, or soon after."""
    arguments = directory / "recipe.yaml", f"checkpoint.dir={directory / run}", *overrides
    code = -signal.SIGKILL if kind == "SIGKILL" else 75
    jobs.run(*arguments, ranks=1, codes=(code,), trouble=(kind, 0, step))


def finish(jobs, directory, run, *overrides, ranks=1):
    return jobs.run(directory / "recipe.yaml", f"checkpoint.dir={directory / run}", *overrides, ranks=ranks)


@pytest.mark.parametrize("kind", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.full)])
def test_resume_after_signal_is_bit_exact(jobs, setup, kind):
    interrupt(jobs, setup, kind, kind, 6)
    stopped_at = metrics(setup, kind)[-1]["step"]
    assert 6 <= stopped_at < STEPS
    assert complete_iterations(setup / kind / "checkpoints")[-1] == stopped_at
    finish(jobs, setup, kind)
    assert losses(setup, kind) == losses(setup, "whole")


@pytest.mark.parametrize("attempt", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 10))])
def test_resume_after_sigkill_at_a_random_moment_is_bit_exact(jobs, setup, draws, attempt):
    run = f"killed-{attempt}"
    interrupt(jobs, setup, run, "SIGKILL", draws.randint(4, 20))
    finish(jobs, setup, run)
    assert losses(setup, run) == losses(setup, "whole")
    assert not list((setup / run / "checkpoints").glob(".iter_*")), "a killed save left something behind"


def test_the_tool_stops_on_a_signal_with_a_checkpoint_and_exit_code_75(setup):
    process = subprocess.Popen(
        command(setup, "tool", "train.steps=100000"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    path = setup / "tool" / "metrics.jsonl"
    while not path.exists() or len(path.read_bytes().splitlines()) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75, said
    assert complete_iterations(setup / "tool" / "checkpoints")[-1] == metrics(setup, "tool")[-1]["step"]


@pytest.mark.full
def test_resume_with_another_number_of_pipeline_stages(jobs, setup):
    """From the stop on the run is as near the whole one, step for step, as one that had two stages all along."""
    float32, two = "precision.dtype=float32", "parallel.pipeline=2"
    interrupt(jobs, setup, "moved", "SIGTERM", 6, float32)
    stopped = len(losses(setup, "moved"))
    finish(jobs, setup, "moved", float32, two, ranks=2)
    finish(jobs, setup, "float32", float32)
    finish(jobs, setup, "float32-pp2", float32, two, ranks=2)
    moved, whole, other = (np.array(losses(setup, name)) for name in ("moved", "float32", "float32-pp2"))
    assert (moved[:, 0] == whole[:, 0]).all()
    assert (moved[:stopped] == whole[:stopped]).all()
    off, allowed = (np.sqrt(np.mean((run - whole) ** 2, 0)) for run in (moved, other))
    assert (off <= AS_GOOD * allowed).all(), (off, allowed)
    assert (allowed < 1e-4 * whole.mean(0)).all()


def test_a_finished_run_says_so(jobs, setup):
    assert "done already" in finish(jobs, setup, "whole")
    assert len(losses(setup, "whole")) == STEPS


def test_another_recipe_is_refused_on_resume(setup):
    refused = run_tool("extend", *command(setup, "whole", "context.rope.factor=8", "train.steps=80")[2:])
    assert_one_line_error(refused, "context.rope.factor=8.0")


@pytest.mark.parametrize("size", ["2m", "3m"], ids=["before", "while-writing"])
def test_full_disk_is_said_in_one_line_and_keeps_the_newest_checkpoint(jobs, setup, tmp_path, size):
    """A checkpoint of this model takes 2.6 MB: none fits, or the first does and the second does not."""
    with file_system_of(tmp_path / "disk", size) as disk:
        keys = f"checkpoint.dir={disk / 'run'}", "checkpoint.interval=2", f"data.cache={setup / 'cache'}"
        said = jobs.run(setup / "recipe.yaml", *keys, ranks=1, codes=(2,))
        (line,) = [line for line in said.splitlines() if "error" in line.lower()]
        assert line.startswith("error: ")
        assert "checkpoint.dir" in line
        assert "no space left" in line
        assert "Traceback" not in said
        checkpoints = disk / "run" / "checkpoints"
        assert complete_iterations(checkpoints) == ([] if size == "2m" else [2])
        assert not list(checkpoints.glob(".iter_*"))
