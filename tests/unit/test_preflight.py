"""tools/preflight.py as one process: its table and exit codes, disks, limits, locks, ranks that do not come."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT, assert_one_line_error, file_system_of, run_tool
from unit.starting import PREFLIGHT_CHECKS

from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.preflight.disk_space import checkpoint_bytes, checkpoints_kept
from endprompt_megatron.preflight.gpu_memory import fits
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN


def test_preflight_of_a_good_recipe_is_ready_and_leaves_nothing_behind(place):
    before = sorted(place.rglob("*"))
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "verdict", "found"]
    assert {line.split("  ")[0] for line in lines[2:-1]} >= PREFLIGHT_CHECKS
    assert lines[-1].startswith("preflight: ready"), lines[-1]
    assert sorted(place.rglob("*")) == before


def absolute(place: Path) -> list[str]:
    paths = {"model.hf": "hf", "model.init_from": "megatron", "data.train": "train", "checkpoint.dir": "run"}
    return [f"{key}={place / name}" for key, name in paths.items()]


def test_json_of_preflight_has_every_check_of_the_table(place):
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place), "checkpoint.dir=/proc/run", "--json")
    said = json.loads(result.stdout)
    assert result.returncode == 2
    assert said["ready"] is False
    assert {check["check"] for check in said["checks"]} >= PREFLIGHT_CHECKS
    wrong = {check["check"] for check in said["checks"] if check["verdict"] == FAIL}
    assert "run directory" in wrong
    assert said["verdict"] == f"preflight: {len(wrong)} checks failed: " + said["verdict"].partition("failed: ")[2]


def test_a_full_disk_fails_with_the_space_that_is_needed(place, at, tmp_path):
    with file_system_of(tmp_path / "disk", "1m") as disk:
        found, code = at(place, f"checkpoint.dir={disk}/run")
    assert code == 2
    assert found["free disk"].verdict == FAIL
    assert "1 checkpoint of 2.8 MB, the export 706.8 kB" in found["free disk"].found
    with file_system_of(tmp_path / "room", "20m") as disk:
        found, code = at(place, f"checkpoint.dir={disk}/run")
        assert (found["free disk"].verdict, code) == (OK, 0)
        found, code = at(place, f"checkpoint.dir={disk}/run", checkpoints=8)
        assert (found["free disk"].verdict, code) == (FAIL, 2)
        assert "8 checkpoints" in found["free disk"].found
        # Elsewhere, the export does not count here: each file system has its own line.
        assert at(place, f"checkpoint.dir={disk}/run", checkpoints=6, export=place / "out")[1] == 0


def test_a_file_system_without_a_byte_left_fails_the_write(place, at, tmp_path):
    with file_system_of(tmp_path / "disk", "64k") as disk:
        subprocess.run(["dd", "if=/dev/zero", f"of={disk}/fill", "bs=4k"], capture_output=True, check=False)
        found, code = at(place, f"checkpoint.dir={disk}")
    assert code == 2
    assert found["run directory"].verdict == FAIL
    assert "no space left" in found["run directory"].found


def test_a_directory_without_permission_fails_the_write(place, at, tmp_path):
    with file_system_of(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        found, code = at(place, f"checkpoint.dir={disk}/run")
    assert code == 2
    assert found["run directory"].verdict == FAIL
    assert "read-only file system" in found["run directory"].found


def test_free_disk_counts_the_checkpoints_that_are_kept(place, monkeypatch):
    monkeypatch.chdir(place)

    def kept(*overrides: str) -> int:
        return checkpoints_kept(load_recipe("recipe.yaml", overrides))

    assert kept("train.steps=1000", "checkpoint.interval=100", "checkpoint.keep=2") == 3
    assert kept("train.steps=1000", "checkpoint.interval=100", "checkpoint.keep=0") == 10
    # 400 and 800 stay beside 900 and 1000.
    assert kept("train.steps=1000", "checkpoint.interval=100", "checkpoint.keep=2", "checkpoint.keep_every=400") == 5
    assert kept("train.steps=50", "checkpoint.interval=100", "checkpoint.keep=2") == 1


def test_predicted_checkpoint_size_equals_the_size_of_a_written_one(place, extend, monkeypatch):
    ran = extend(place, "recipe.yaml", "train.steps=3")
    assert ran.returncode == 0, ran.stderr
    (written,) = (place / "run/checkpoints").glob("iter_*")
    held = sum(path.stat().st_size for path in written.glob("*.distcp"))
    monkeypatch.chdir(place)
    predicted = checkpoint_bytes(load_recipe("recipe.yaml"), read_shape("hf"))
    assert held == pytest.approx(predicted, rel=0.1)  # tensors of 64 numbers beside their headers


def test_a_run_directory_in_use_is_refused_and_an_abandoned_one_is_not(place, at):
    holder = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import time\n"
    holder += "from endprompt_megatron.distributed.run_lock import RunLock\n"
    holder += "RunLock(Path('run')).acquire(); print('held', flush=True); time.sleep(3600)"
    other = subprocess.Popen([sys.executable, "-c", holder, str(ROOT)], cwd=place, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        found, code = at(place)
        assert (code, found["run lock"].verdict) == (2, FAIL)
        assert f"in use by process {other.pid}" in found["run lock"].found
    finally:
        other.kill()
        other.wait()
    found, code = at(place)
    assert (code, found["run lock"].verdict) == (0, OK)


@pytest.mark.parametrize(
    ("gib", "verdict", "words"),
    [(79.6, OK, "79.6 GiB on the smallest GPU"), (3.0, WARN, "uncertainty of 4 GiB"), (0.5, FAIL, "tools/plan.py")],
)
def test_the_plan_must_fit_the_smallest_gpu(place, monkeypatch, gib, verdict, words):
    monkeypatch.chdir(place)
    parts = {rank: {"visible": {"a": ["big", 90.0], "b": ["H100", gib]}, "own": "ab"[rank]} for rank in (0, 1)}
    (finding,) = fits(load_recipe("recipe.yaml"), 2, parts, None)
    assert finding.verdict == verdict, finding
    assert words in finding.found
    (finding,) = fits(load_recipe("recipe.yaml"), 2, {0: {"visible": {}, "own": None}}, "h100")
    assert (finding.verdict, "on --gpu h100" in finding.found) == (OK, True)
    assert fits(load_recipe("recipe.yaml"), 2, {0: {"visible": {}, "own": None}}, None) == []


def test_a_login_node_checks_for_the_world_size_and_gpu_of_the_cluster(place, at):
    found, code = at(place, "parallel.tensor=2", "parallel.pipeline=2")
    assert "legal on 4 processes (the fewest that this layout takes" in found["recipe"].found
    assert code == 0
    found, code = at(place, "parallel.tensor=2", world_size=3)
    assert (code, found["recipe"].verdict) == (2, FAIL)
    assert "does not divide the 3 processes" in found["recipe"].found
    found, code = at(place, "precision.fp8=hybrid", "precision.dtype=bfloat16", gpu="h100")
    assert (code, found["recipe"].verdict) == (0, OK), found
    assert "checked for --gpu h100" in found["GPUs"].found
    found, code = at(place, "precision.fp8=hybrid", "precision.dtype=bfloat16")
    assert (code, found["recipe"].verdict) == (2, FAIL)


def test_few_open_files_are_a_warning_and_very_few_a_failure(place, at, monkeypatch):
    import resource

    for soft, verdict in ((512, WARN), (200, FAIL)):
        monkeypatch.setattr(resource, "getrlimit", lambda _which, soft=soft: (soft, 4096))
        found, _ = at(place)
        assert (
            found["open files (ulimit -n)"].verdict,
            "ulimit -n 65536" in found["open files (ulimit -n)"].found,
        ) == (
            verdict,
            True,
        )


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["nowhere.yaml"], ["nowhere.yaml: no such recipe"]),
        (["recipe.yaml", "--timeout", "0"], ["--timeout 0.0: should be above 0"]),
        (["recipe.yaml", "--gpu", "tpu"], ["--gpu tpu", "h100"]),
        (["recipe.yaml", "train.nonsense=1"], ["unknown key train.nonsense"]),
    ],
)
def test_wrong_input_of_preflight_ends_in_one_line(place, arguments, needles):
    assert_one_line_error(run_tool("preflight", place / arguments[0], *arguments[1:]), *needles)


def test_a_rank_that_cannot_reach_the_rendezvous_ends_in_one_line(place):
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place), "--timeout", "2", env=env)
    assert_one_line_error(result, "rank 1", "127.0.0.1:1", "within 2 s")


def test_a_rank_that_does_not_arrive_is_named_and_the_other_checks_run(place):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place), "--timeout", "2", "--json", env=env)
    assert result.returncode == 2, result.stderr
    found = {check["check"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["processes"]["verdict"] == FAIL
    assert "rank 1 did not arrive within 2 s" in found["processes"]["found"]
    assert (found["all-reduce"]["verdict"], found["data.train"]["verdict"]) == (NOT_RUN, OK)
    assert not (place / "run").exists()
