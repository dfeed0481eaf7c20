"""`sbatch slurm/extend_70b.sh` on a real Slurm of two nodes: the whole way, and whatever can interrupt it.

A tiny model of 70B's shape family (GQA 8:1, 4 of 80 layers), TP2 x PP2 over two nodes of two ranks; everything
that differs from the real job is in the environment, the recipe among it.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from slurm.cluster import kill, with_environment
from small import ROOT, run_tool, small_llama, text

STEPS, INTERVAL = 40, 5
RECIPE = f"""
inherit: {ROOT}/recipes/llama3_70b_64k.yaml
context: {{original: 64, target: 256, physical: 48}}
parallel: {{tensor: 2, pipeline: 2, virtual_pipeline: null, context: 1, overlap_tensor: false}}
train: {{steps: {STEPS}, global_batch_size: 4, straggler_interval: 0}}
optim: {{lr: 1.0e-3, warmup_steps: 2}}
checkpoint: {{interval: {INTERVAL}}}
log: {{tensorboard: false}}
"""


class Ground:
    """A model, data and a recipe, and jobs on them."""

    def __init__(self, place: Path, cluster) -> None:
        self.place, self.cluster = place, cluster
        self.venv = place / "venv"  # what VENV names: a directory with bin/python
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (self.venv / "bin" / "python").chmod(0o755)
        small_llama(place / "hf", num_attention_heads=16, num_key_value_heads=2, hidden_size=128, head_dim=8)
        (place / "text.txt").write_text(text(60_000))
        data = ("--input", place / "text.txt", "--tokenizer", place / "hf", "--out", place / "train")
        prepared = run_tool("prepare_data", *data)
        assert prepared.returncode == 0, prepared.stderr
        (place / "recipe.yaml").write_text(RECIPE)

    def submit(self, run: str, *options: str, **environment: object) -> int:
        variables = {
            "RECIPE": self.place / "recipe.yaml",
            "HF_MODEL": self.place / "hf",
            "DATA": self.place / "train",
            "RUN": self.place / run,
            "VENV": self.venv,
            "PROCESSES_PER_NODE": 2,
            "RENDEZVOUS_ADDRESS": "127.0.0.1",  # the nodes' names mean nothing outside this Slurm
            "OMP_NUM_THREADS": 1,
            "SKIP_PREFLIGHT": 1,
            "SKIP_EVALUATION": 1,
            "ENDPROMPT_HOME": ROOT,
        }
        script = ROOT / "slurm" / "extend_70b.sh"
        output = f"--output={self.log(run)}"
        variables.update(environment)
        return self.cluster.submit("--nodes=2", output, *options, script, cwd=self.place, **variables)

    def log(self, run: str) -> Path:
        return self.place / f"{run}.log"

    def said(self, run: str) -> str:
        steps = sorted((self.place / run).glob("slurm/job-*/*.log"))
        parts = [self.log(run), *steps]
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in parts if path.exists()
        )

    def losses(self, run: str) -> list[tuple]:
        path = self.place / run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    def until_step(self, run: str, step: int) -> None:
        self.until(f"step {step}", lambda: self.losses_so_far(run) >= step, run)

    def until(self, what: str, condition, run: str, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what}\n{self.said(run)}"
            time.sleep(0.05)

    def losses_so_far(self, run: str) -> int:
        path = self.place / run / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def finish(self, run: str, job: int, reference: list[tuple]) -> dict[str, str]:
        """The job is done under the same id, after at least one requeue, with the losses of a run left in peace."""
        found = self.cluster.wait(job)
        assert found["JobState"] == "COMPLETED", self.said(run)
        assert int(found["Restarts"]) >= 1, self.said(run)
        assert self.losses(run) == reference
        assert (self.place / run / "hf" / "config.json").is_file()
        return found


@pytest.fixture(scope="module")
def ground(cluster, tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("jobs"), cluster)


@pytest.fixture(scope="module")
def whole(ground):
    """The uninterrupted job, with preflight, conversion, export and evaluation."""
    job = ground.submit(
        "whole",
        SKIP_PREFLIGHT=0,
        SKIP_EVALUATION=0,
        EVALUATE_SUITE="perplexity",
        EVALUATE_LENGTHS="64,128",
        EVALUATE_OPTIONS="--scored 16 --windows 1",
    )
    found = ground.cluster.wait(job)
    assert found["JobState"] == "COMPLETED", ground.said("whole")
    assert found["Restarts"] == "0"
    return job


@pytest.fixture(scope="module")
def reference(ground, whole):
    losses = ground.losses("whole")
    assert [step for step, _, _ in losses] == list(range(1, STEPS + 1))
    assert losses[-1][1] < losses[0][1]
    return losses


def test_a_slurm_job_checks_converts_trains_and_exports(ground, whole, reference):
    import torch
    from transformers import AutoModelForCausalLM

    logs = ground.place / "whole" / "slurm" / f"job-{whole}"
    assert "preflight: ready" in (logs / "preflight.0.node0.log").read_text()
    assert (ground.place / "hf-megatron" / "latest_checkpointed_iteration.txt").is_file()
    model = AutoModelForCausalLM.from_pretrained(ground.place / "whole" / "hf")
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_type"] == "linear"
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(200)[None]).logits).all()


@pytest.mark.full
def test_the_evaluation_job_runs_after_the_training_job(ground, whole):
    lines = ground.log("whole").read_text().splitlines()
    submitted = [line for line in lines if line.startswith("Submitted batch job")]
    assert len(submitted) == 1
    found = ground.cluster.wait(int(submitted[0].split()[-1]))
    assert found["JobState"] == "COMPLETED", ground.said("whole")
    results = json.loads((ground.place / "whole" / "evaluation" / "results.json").read_text())
    for label in ("baseline", "extended"):
        assert results["models"][label]["path"]
        losses = {each["length"]: each["loss"] for each in results["measurements"][label]["perplexity"]["by_length"]}
        assert set(losses) == {64, 128}
        assert all(0 < loss < 20 for loss in losses.values())
    assert set(results["models"]) == {"baseline", "extended"}
    assert results["settings"]["suites"] == ["perplexity"]
    assert list((ground.place / "whole").glob("*.html"))


@pytest.mark.full
def test_signal_before_the_limit_checkpoints_and_requeues_bit_exact(ground, reference):
    job = ground.submit("signalled")
    ground.until_step("signalled", 12)
    ground.cluster.call("scancel", "--signal=USR2", "--batch", job)
    ground.finish("signalled", job, reference)
    assert "stopped with a checkpoint; requeueing" in ground.log("signalled").read_text()


@pytest.mark.full
def test_a_slurm_job_resumes_after_kill_9_of_a_rank(ground, reference):
    job = ground.submit("killed")
    ground.until_step("killed", 14)
    (rank,) = ranks(job, 0)
    kill(rank)
    ground.finish("killed", job, reference)
    assert "ranks were lost; requeueing" in ground.log("killed").read_text()


@pytest.mark.full
def test_a_slurm_job_resumes_after_a_node_is_lost_and_returns(ground, reference):
    job = ground.submit("nodeless")
    ground.until_step("nodeless", 14)
    ground.cluster.kill_node("n2")
    time.sleep(3)
    ground.cluster.start_node("n2")
    ground.finish("nodeless", job, reference)


@pytest.mark.full
def test_time_limit_checkpoints_and_requeues(ground, reference):
    """Slurm's own warning, 45 to 75 s after a start; a run of any length is stopped by it, and then asked to finish."""
    recipe = ground.place / "endless.yaml"
    recipe.write_text("inherit: recipe.yaml\ntrain: {steps: 5000}\n")
    job = ground.submit("limited", "--time=00:02:00", "--signal=B:USR2@60", RECIPE=recipe)
    ground.until("requeued", lambda: ground.cluster.job(job)["Restarts"] == "1", "limited")
    done = ground.losses_so_far("limited")
    assert done
    ground.until_step("limited", done + 3)
    ground.cluster.call("scancel", "--signal=USR1", "--batch", job)
    found = ground.cluster.wait(job)
    assert found["ExitCode"] == "75:0", ground.said("limited")
    steps = [step for step, _, _ in ground.losses("limited")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= done + 3
    newest = ground.place / "limited" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert int(newest.read_text()) == len(steps)
    said = ground.log("limited").read_text()
    assert "stopped with a checkpoint; requeueing" in said
    assert "asked to finish: not requeued" in said


@pytest.mark.full
def test_a_slurm_job_without_progress_gives_up(ground, reference):
    """Ranks that are lost before the first checkpoint, each time: not for ever."""
    job = ground.submit("nowhere", MAX_FAILURES=2)
    for start in range(2):
        ground.until("rank", partial(ranks, job, start), "nowhere")
        kill(min(ranks(job, start)))
    found = ground.cluster.wait(job)
    assert (found["ExitCode"], found["Restarts"]) == ("1:0", "1"), ground.said("nowhere")
    assert "2 consecutive starts wrote no checkpoint after step 0" in ground.log("nowhere").read_text()


def ranks(job: int, start: int, rank: int = 3) -> list[int]:
    """The process of a rank of a job's first start (0), second, ..."""
    named = [f"SLURM_JOB_ID={job}", f"RANK={rank}", *([f"SLURM_RESTART_COUNT={start}"] if start else [])]
    return list(set.intersection(*(set(with_environment(name)) for name in named)))


@pytest.mark.full
def test_second_job_on_the_same_run_directory_is_refused(ground, reference):
    # Both hold one node's worth of ranks, so that they can run side by side.
    one_node = ground.place / "one_node.yaml"
    one_node.write_text("inherit: recipe.yaml\nparallel: {pipeline: 1}\ntrain: {steps: 400}\n")
    first = ground.submit("shared", "--nodes=1", RECIPE=one_node)
    ground.until_step("shared", 3)
    second = ground.submit("shared", "--nodes=1", f"--output={ground.place / 'second.log'}", RECIPE=one_node)
    found = ground.cluster.wait(second)
    ground.cluster.call("scancel", first)
    said = (ground.place / "second.log").read_text()
    assert found["JobState"] == "FAILED"
    assert found["ExitCode"] == "2:0", said
    assert found["Restarts"] == "0"
    assert f"job {first}" in said
    assert ground.cluster.wait(first)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("leave_out", ["HF_MODEL", "DATA", "RUN", "VENV"])
def test_missing_variable_ends_the_job_in_one_line(ground, leave_out):
    job = ground.submit("without", **{leave_out: ""})
    assert ground.cluster.wait(job)["ExitCode"] == "2:0"
    (line,) = ground.log("without").read_text().splitlines()
    assert line.startswith("error: ")
    assert leave_out in line
    ground.log("without").unlink()
