"""The tools on a GPU, from a Hugging Face model and back: prepare, train, stop, go on, export, compare."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from parallel.jobs import steps_of
from small import PATIENCE, ROOT, run_tool, small_llama, text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    small_llama(
        directory / "hf", hidden_size=512, intermediate_size=1024, num_attention_heads=4, initializer_range=0.03
    )
    (directory / "text.txt").write_text(text(40_000))
    done = run_tool(
        "prepare_data",
        *("--input", directory / "text.txt", "--tokenizer", directory / "hf", "--out", directory / "train"),
    )
    assert done.returncode == 0, done.stderr
    (directory / "recipe.yaml").write_text(
        f"model: {{hf: {directory / 'hf'}, init_from: {directory / 'hf'}}}\n"
        "context: {target: 1024, physical: 256, prompts: [EP_3, EP_2]}\n"
        f"data: {{train: {directory / 'train'}, cache: {directory / 'cache'}}}\n"
        "train: {steps: 30, global_batch_size: 8}\n"
        "optim: {lr: 1.0e-4, warmup_steps: 2}\n"
        "precision: {dtype: bfloat16}\n"
        "checkpoint: {dir: UNSET, interval: 5}\n"
        "log: {tensorboard: false}\n"
    )
    return directory


def start(place, run, *overrides) -> subprocess.Popen:
    command = [sys.executable, ROOT / "tools/extend.py", place / "recipe.yaml", f"checkpoint.dir={run}", *overrides]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("keys", [[], ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"]], ids=["bf16", "fp8"])
def test_a_run_is_stopped_goes_on_and_is_exported(place, keys):
    if keys:
        pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    run = place / f"run-{len(keys)}"
    job = start(place, run, "train.steps=100000", *keys)
    deadline = time.monotonic() + PATIENCE
    while len(steps_of(run)) < 8:
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGUSR1)
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 75, said
    done = len(steps_of(run))
    job = start(place, run, f"train.steps={done + 5}", *keys)
    said, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, said
    assert [step for step, _, _ in steps_of(run)] == list(range(1, done + 6))
    exported = place / f"exported-{len(keys)}"
    checked = run_tool("convert_megatron_to_hf", "--megatron", run / "checkpoints", "--out", exported, "--verify")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert json.loads((exported / "config.json").read_text())["max_position_embeddings"] == 1024
