"""A run survives: kills at any moment, damaged checkpoints, hung ranks; and one run directory has one job."""

import json
import os
import re
import shutil
import signal
import time

import psutil
import pytest
from parallel.jobs import Jobs, steps_of
from parallel.test_checkpoints import assert_same, everything
from small import PATIENCE, run_tool, small_llama, text

from endprompt_megatron.checkpoint.layout import complete_iterations, iteration_dir
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

STEPS, INTERVAL = 48, 3


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, jobs):
    """A tiny model, its checkpoint, prepared text and a recipe; and the whole run of two data-parallel ranks."""
    directory = tmp_path_factory.mktemp("survival")
    small_llama(directory / "hf", num_hidden_layers=2)
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
        f"data: {{train: {directory / 'train'}, cache: {directory / 'cache'}}}\n"
        f"train: {{steps: {STEPS}, global_batch_size: 4}}\n"
        "optim: {lr: 1.0e-3, warmup_steps: 2, schedule: cosine}\n"
        f"checkpoint: {{dir: UNSET, interval: {INTERVAL}}}\n"
        "log: {tensorboard: false}\n"
    )
    jobs.run(directory / "recipe.yaml", f"checkpoint.dir={directory / 'whole'}")
    assert [step for step, _, _ in steps_of(directory / "whole")] == list(range(1, STEPS + 1))
    return directory


def newest(run):
    return max(complete_iterations(run / "checkpoints"), default=0)


def stop_after(jobs, run, step, place, *overrides):
    """Go on with a run until `step` is logged, then ask it to stop: it saves and exits with 75."""
    job = jobs.start(place / "recipe.yaml", f"checkpoint.dir={run}", "train.steps=3000", *overrides)
    deadline = time.monotonic() + PATIENCE
    while not any(logged >= step for logged, _, _ in steps_of(run)):
        assert all(process.is_alive() for process in job.processes), job.said()
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.05)
    for process in job.processes:
        os.kill(process.pid, signal.SIGUSR1)
    assert job.wait() == [75, 75], job.said()


def test_killed_at_any_moment_it_resumes_to_the_last_bit(jobs, place, draws, few_or_many):
    """Runs in a chain, each killed and gone on from; saves with and without a thread, one or both ranks.

    What is lost is at most the interval.  A save beside the training is not there until it is written, which
    the next save waits for: there, at most two.
    """
    run, kills = place / "killed", few_or_many(2, 20)
    saves = run / "checkpoints"
    logged = lost = written = 0
    for attempt in range(kills):
        beside = attempt % 2 == 1
        before, log = newest(run), steps_of(run) if run.is_dir() else []
        asynchronous = f"checkpoint.async={str(beside).lower()}"
        job = jobs.start(place / "recipe.yaml", f"checkpoint.dir={run}", asynchronous, "train.steps=3000")
        # Half of them while something is written, the others at any moment: starting, loading, training.
        until = time.monotonic() + draws.uniform(0.0, 4.0)
        leftover = {entry.stat().st_ino for entry in saves.glob(".iter_*.partial")} if saves.is_dir() else set()
        while time.monotonic() < until or (attempt % 4 < 2 and not growing(saves, leftover)):
            assert all(process.is_alive() for process in job.processes), job.said()
            assert time.monotonic() < until + PATIENCE, job.said()
            time.sleep(0.002)
        time.sleep(draws.uniform(0.0, 0.02))
        written += growing(saves, leftover)
        children = [child for process in job.processes for child in psutil.Process(process.pid).children(True)]
        os.kill(draws.choice(job.processes).pid, signal.SIGKILL)
        time.sleep(draws.choice([0.0, 0.05]))
        job.kill()
        _, alive = psutil.wait_procs(children, PATIENCE)
        assert not alive, "processes stayed behind"
        logged = max((step for step, _, _ in steps_of(run)), default=0)
        assert newest(run) >= before
        if steps_of(run) != log:  # a run that was killed before its first step left the log of the one before it
            assert logged - newest(run) <= INTERVAL * (2 if beside else 1), job.said()
        lost = max(lost, logged - newest(run))
    assert written >= kills // 4
    print(f"killed {kills} times, {written} while writing; at step {logged}; lost {lost} steps at most")
    stop_after(jobs, run, logged + INTERVAL, place, "checkpoint.keep=3")
    stop_after(jobs, place / "never", logged + INTERVAL, place, "checkpoint.keep=0")
    killed, never = steps_of(run), steps_of(place / "never")
    common = min(len(killed), len(never))
    assert common > logged
    assert killed[:common] == never[:common]
    assert not list(saves.glob(".iter_*")), "a killed save left something behind"
    step = max(set(complete_iterations(saves)) & set(complete_iterations(place / "never" / "checkpoints")))
    assert step > 0
    ends = [everything(iteration_dir(place / name / "checkpoints", step), 320) for name in ("killed", "never")]
    assert_same(*ends)


def growing(saves, leftover):
    """Whether a checkpoint is being written, other than what a run that was killed left."""
    try:
        return any(entry.stat().st_ino not in leftover for entry in saves.glob(".iter_*.partial"))
    except FileNotFoundError:
        return False


def flip(path, place=0.5):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {  # file of the newest checkpoint, what happens to it, what is said
    "data-flipped": ("__1_0.distcp", flip, "__1_0.distcp does not have the CRC-32"),
    "data-truncated": ("__0_0.distcp", truncate, "__0_0.distcp has"),
    "data-deleted": ("__1_0.distcp", os.unlink, "__1_0.distcp is missing"),
    "metadata-flipped": (".metadata", flip, ".metadata does not have the CRC-32"),
    "scheduler-deleted": ("common.pt", os.unlink, "common.pt is missing"),
    "manifest-deleted": ("endprompt.json", os.unlink, "endprompt.json is missing"),
    "manifest-truncated": ("endprompt.json", truncate, "endprompt.json: cannot be read"),
    "manifest-flipped": ("endprompt.json", lambda path: edit(path, step=STEPS - 1), "endprompt.json: does not have"),
}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_newest_checkpoint_falls_back_and_says_so(jobs, place, tmp_path, kind):
    name, damage, said = DAMAGES[kind]
    shutil.copytree(place / "whole", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert complete_iterations(checkpoints) == [STEPS - INTERVAL, STEPS]
    damage(iteration_dir(checkpoints, STEPS) / name)
    printed = jobs.run(place / "recipe.yaml", f"checkpoint.dir={tmp_path / 'run'}")
    (line,) = [line for line in printed.splitlines() if "falling back" in line]
    assert said in line
    assert f"iter_{STEPS - INTERVAL:07d}: steps {STEPS - INTERVAL + 1} to {STEPS} are lost" in line
    assert steps_of(tmp_path / "run") == steps_of(place / "whole")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (record,) = [line["damaged_checkpoint"] for line in lines if "damaged_checkpoint" in line]
    assert (record["lost_from"], record["lost_to"]) == (STEPS - INTERVAL + 1, STEPS)
    assert said in record["reason"]
    assert complete_iterations(checkpoints) == [STEPS - INTERVAL, STEPS]
    assert (checkpoints / f"iter_{STEPS:07d}.damaged").is_dir()


def test_only_damaged_checkpoints_are_an_error_and_no_new_beginning(jobs, place, tmp_path):
    shutil.copytree(place / "whole", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for iteration in complete_iterations(checkpoints):
        flip(iteration_dir(checkpoints, iteration) / "__0_0.distcp")
    for _ in range(2):  # the second time they are set aside already
        printed = jobs.run(place / "recipe.yaml", f"checkpoint.dir={tmp_path / 'run'}", codes=(2,))
        (line,) = printed.splitlines()
        assert line.startswith("error: ")
        assert "only damaged ones" in line
    assert len(steps_of(tmp_path / "run")) == STEPS, "what was logged is still there"


def test_the_newest_and_the_milestones_are_kept(jobs, place, tmp_path):
    keys = ["train.steps=14", "checkpoint.interval=2", "checkpoint.keep_every=6", "checkpoint.async=true"]
    jobs.run(place / "recipe.yaml", f"checkpoint.dir={tmp_path / 'run'}", *keys)
    assert complete_iterations(tmp_path / "run" / "checkpoints") == [6, 12, 14]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_second_job_on_the_same_run_is_refused_and_the_first_goes_on(jobs, place, tmp_path):
    keys = [f"checkpoint.dir={tmp_path / 'run'}", "train.steps=3000"]
    first = jobs.start(place / "recipe.yaml", *keys)
    while not steps_of(tmp_path / "run"):
        assert all(process.is_alive() for process in first.processes), first.said()
        time.sleep(0.05)
    (line,) = jobs.run(place / "recipe.yaml", *keys, codes=(2,)).splitlines()
    assert line.startswith("error: ")
    assert f"in use by process {first.processes[0].pid} on " in line
    for process in first.processes:
        os.kill(process.pid, signal.SIGTERM)
    assert first.wait() == [75, 75], first.said()
    reached = len(steps_of(tmp_path / "run"))
    printed = jobs.run(place / "recipe.yaml", keys[0], f"train.steps={reached}")
    assert "done already" in printed


WATCHED = [
    "train.watchdog_floor_s=6",  # steps of a busy machine take a second
    "train.steps=3000",
    "checkpoint.interval=1000",
]


@pytest.mark.parametrize("kind", ["reads", pytest.param("stopped", marks=pytest.mark.full)])
def test_one_rank_hangs_and_all_that_can_say_where_they_are(jobs, place, tmp_path, kind):
    run = tmp_path / "run"
    trouble = ("hang", 1, 8) if kind == "reads" else None
    job = jobs.start(place / "recipe.yaml", f"checkpoint.dir={run}", *WATCHED, trouble=trouble)
    while len(steps_of(run)) < 7:
        assert all(process.is_alive() for process in job.processes), job.said()
        time.sleep(0.02)
    if kind == "stopped":
        os.kill(job.processes[1].pid, signal.SIGSTOP)
    hung = job.processes if kind == "reads" else job.processes[:1]
    for process in hung:
        process.join(PATIENCE)  # without the watchdog it would never end
        assert process.exitcode == 1, job.said()
    job.kill()
    (line,) = [line for line in job.said().splitlines() if line.startswith("watchdog: ")]
    stacks = {path.name: path.read_text() for path in (run / "stacks").iterdir() if path.stat().st_size}
    assert "run_batch" in stacks["rank_0.txt"]
    if kind == "reads":
        assert re.search(r"step 8 .*rank 0 in \S+ \w+.*; rank 1 in feed\.py|rank 1 in .*disturbed", line), line
        assert "in disturbed" in stacks["rank_1.txt"]
    else:
        assert "nothing from rank 1 (" in line


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_an_error_on_one_rank_ends_all_of_them_with_its_traceback(jobs, place, tmp_path, rank):
    """Although its groups could not be destroyed any more.  A launcher ends the others, if they wait."""
    job = jobs.start(place / "recipe.yaml", f"checkpoint.dir={tmp_path / 'run'}", trouble=("raises", rank, 3))
    assert job.wait() == [1, 1]
    said = (job.output.parent / f"{job.output.name}.{rank}").read_text()
    assert "Traceback (most recent call last)" in said
    assert "RuntimeError: a read that nobody expected to fail" in said
    assert "in disturbed" in said


def test_the_slow_rank_is_named(jobs, place, tmp_path):
    keys = ["train.steps=4", "train.straggler_interval=2"]
    printed = jobs.run(place / "recipe.yaml", f"checkpoint.dir={tmp_path / 'run'}", *keys, trouble=("slow", 1, 1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["stragglers"]) for line in lines if "stragglers" in line]
    assert [step for step, _ in found] == [2, 4]
    for _, values in found:
        assert values["rank"] == 1
        assert values["data_s"] > 0.49
        assert values["ratio"] > 1.5
    assert printed.count("slowest rank 1 (") == 2
