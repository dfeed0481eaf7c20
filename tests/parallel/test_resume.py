"""Stopped and started again, a run gives the losses of the run that was never stopped, to the last bit."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from small import ROOT, assert_one_line_error, file_system_of, run_tool, small_llama, text

from endprompt_megatron.checkpoint.layout import complete_iterations
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

STEPS = 60


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
    finished = subprocess.run(command(directory, "whole"), capture_output=True, text=True, timeout=300)
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


def interrupt(directory, run, signal_number, after_steps, *overrides):
    """Start a run, send the signal once `after_steps` steps are logged and a random moment later; exit code."""
    process = subprocess.Popen(
        command(directory, run, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    path = directory / run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not path.exists() or len(path.read_bytes().splitlines()) < after_steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.15))
    process.send_signal(signal_number)
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_resume_after_signal_is_bit_exact(setup, signal_number):
    run = f"run-{signal_number}"
    assert interrupt(setup, run, signal_number, after_steps=6) == 75
    stopped_at = metrics(setup, run)[-1]["step"]
    assert stopped_at < STEPS
    assert complete_iterations(setup / run / "checkpoints")[-1] == stopped_at
    resumed = subprocess.run(command(setup, run), capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(setup, run) == losses(setup, "whole")


@pytest.mark.parametrize("attempt", range(2))
def test_resume_after_sigkill_at_a_random_moment_is_bit_exact(setup, attempt):
    run = f"killed-{attempt}"
    assert interrupt(setup, run, signal.SIGKILL, after_steps=random.randint(4, 20)) == -signal.SIGKILL
    resumed = subprocess.run(command(setup, run), capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(setup, run) == losses(setup, "whole")
    assert not list((setup / run / "checkpoints").glob(".iter_*")), "a killed save left something behind"


def test_resume_with_another_number_of_pipeline_stages(setup):
    assert interrupt(setup, "moved", signal.SIGTERM, 6, "precision.dtype=float32") == 75
    resumed = subprocess.run(
        command(setup, "moved", "precision.dtype=float32", "parallel.pipeline=2", "--processes", "2"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert resumed.returncode == 0, resumed.stderr
    whole = subprocess.run(
        command(setup, "float32", "precision.dtype=float32"), capture_output=True, text=True, timeout=300
    )
    assert whole.returncode == 0, whole.stderr
    for (step, loss, _), (expected_step, expected, _) in zip(
        losses(setup, "moved"), losses(setup, "float32"), strict=True
    ):
        assert step == expected_step
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_says_so(setup):
    again = subprocess.run(command(setup, "whole"), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0
    assert "done already" in again.stdout
    assert len(losses(setup, "whole")) == STEPS


def test_another_recipe_is_refused_on_resume(setup):
    refused = subprocess.run(
        command(setup, "whole", "context.rope.factor=8", "train.steps=80"), capture_output=True, text=True, timeout=300
    )
    assert refused.returncode == 2
    assert "context.rope.factor=8.0" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


@pytest.mark.parametrize("size", ["2m", "3m"], ids=["before", "while-writing"])
def test_full_disk_is_said_in_one_line_and_keeps_the_newest_checkpoint(setup, tmp_path, size):
    """A checkpoint of this model takes 2.6 MB: none fits, or the first does and the second does not."""
    with file_system_of(tmp_path / "disk", size) as disk:
        arguments = command(setup, disk / "run", "checkpoint.interval=2", f"data.cache={setup / 'cache'}")
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert_one_line_error(result, "checkpoint.dir", "no space left")
        checkpoints = disk / "run" / "checkpoints"
        assert complete_iterations(checkpoints) == ([] if size == "2m" else [2])
        assert not list(checkpoints.glob(".iter_*"))
