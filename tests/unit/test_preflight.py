"""tools/preflight.py as one process: each thing that can be wrong is made wrong, and named; the rest still runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import ROOT, assert_one_line_error, edit_json, file_system_of, run_tool, small_llama

from endprompt_megatron import preflight
from endprompt_megatron.config import load_recipe
from endprompt_megatron.preflight import Options
from endprompt_megatron.preflight_disk import checkpoint_bytes, checkpoints_kept
from endprompt_megatron.preflight_memory import fits
from endprompt_megatron.preflight_table import FAIL, NOT_RUN, OK, WARN
from endprompt_megatron.shape import read_shape

EVERY_CHECK = {
    *("processes", "recipe", "GPUs", "torch", "Megatron-Core", "open files (ulimit -n)", "/dev/shm", "run directory"),
    *(
        "run lock",
        "shared file system",
        "clock skew",
        "all-reduce",
        "HF checkpoint",
        "converted checkpoint",
        "tokenizer",
    ),
    *("data.train", "free disk"),
}


@pytest.fixture
def at(monkeypatch):
    """Run preflight in a directory: findings by check, and the exit code."""

    def run(directory: Path, *overrides: str, **options) -> tuple[dict, int]:
        monkeypatch.chdir(directory)
        for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        outcome = preflight.run("recipe.yaml", list(overrides), Options(**options))
        return {finding.check: finding for finding in outcome.findings}, outcome.code

    return run


def test_what_is_right_is_ready_and_nothing_stays_behind(place):
    before = sorted(place.rglob("*"))
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "verdict", "found"]
    assert {line.split("  ")[0] for line in lines[2:-1]} >= EVERY_CHECK
    assert lines[-1].startswith("preflight: ready"), lines[-1]
    assert sorted(place.rglob("*")) == before


def absolute(place: Path) -> list[str]:
    paths = {"model.hf": "hf", "model.init_from": "megatron", "data.train": "train", "checkpoint.dir": "run"}
    return [f"{key}={place / name}" for key, name in paths.items()]


def test_json_says_the_same(place):
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place), "checkpoint.dir=/proc/run", "--json")
    said = json.loads(result.stdout)
    assert result.returncode == 2
    assert said["ready"] is False
    assert {check["check"] for check in said["checks"]} >= EVERY_CHECK
    wrong = {check["check"] for check in said["checks"] if check["verdict"] == FAIL}
    assert "run directory" in wrong
    assert said["verdict"] == f"preflight: {len(wrong)} checks failed: " + said["verdict"].partition("failed: ")[2]


def shards(place: Path) -> None:
    """The model again, in several shards."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "hf")
    (place / "hf/model.safetensors").unlink()
    model.save_pretrained(place / "hf", max_shard_size="200KB")
    assert len(list((place / "hf").glob("model-*.safetensors"))) > 2


def without_a_shard(place: Path) -> None:
    shards(place)
    next((place / "hf").glob("model-00002-*")).unlink()


def with_a_cut_shard(place: Path) -> None:
    shards(place)
    cut(next((place / "hf").glob("model-00003-*")), 100)


def with_an_index_that_errs(place: Path) -> None:
    shards(place)
    index = place / "hf/model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = value["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(value))


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def edit_idx(place: Path, offset: int, value: int) -> None:
    path = place / "train.idx"
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = value.to_bytes(8, "little")
    path.write_bytes(content)


def other_tokenizer(place: Path) -> None:
    (place / "train.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))


def larger_tokenizer(place: Path) -> None:
    value = json.loads((place / "hf/tokenizer.json").read_text())
    value["added_tokens"][-1]["id"] = 900
    (place / "hf/tokenizer.json").write_text(json.dumps(value))


def of_three_layers(place: Path) -> None:
    edit_json(place / "megatron/iter_0000000/hf/config.json", num_hidden_layers=3)


CONVERTED = "megatron/iter_0000000"
# name: (overrides, damage, check, verdict, what is said)
WRONG = {
    "missing-shard": ([], without_a_shard, "HF checkpoint", FAIL, ["1 of ", "shards missing: model-00002"]),
    "cut-shard": ([], with_a_cut_shard, "HF checkpoint", FAIL, ["1 damaged: model-00003", "header says"]),
    "cut-header": (
        [],
        lambda p: (p / "hf/model.safetensors").write_bytes(b"\x00\x10\x00\x00\x00\x00\x00\x00{"),
        "HF checkpoint",
        FAIL,
        ["model.safetensors (cut short at 9 bytes)"],
    ),
    "wrong-index": ([], with_an_index_that_errs, "HF checkpoint", FAIL, ["model.norm.weight is in model-00001"]),
    "no-weights-but-converted": (
        [],
        lambda p: (p / "hf/model.safetensors").unlink(),
        "HF checkpoint",
        WARN,
        ["converted already"],
    ),
    "no-weights-at-all": (
        ["model.init_from=nowhere"],
        lambda p: (p / "hf/model.safetensors").unlink(),
        "HF checkpoint",
        FAIL,
        ["hf: no model.safetensors"],
    ),
    "other-shape": (
        [],
        lambda p: edit_json(p / "hf/config.json", intermediate_size=128),
        "HF checkpoint",
        FAIL,
        ["has shape [112, 64], config.json says [128, 64]"],
    ),
    "more-layers": (
        [],
        lambda p: edit_json(p / "hf/config.json", num_hidden_layers=5),
        "HF checkpoint",
        FAIL,
        ["9 tensors are missing: model.layers.4"],
    ),
    "not-converted-yet": (
        ["model.init_from=nowhere"],
        lambda p: None,
        "converted checkpoint",
        WARN,
        ["nowhere is not there yet", "convert_hf_to_megatron.py --hf hf --out nowhere"],
    ),
    "nothing-to-start-from": (
        ["model.init_from=null"],
        lambda p: None,
        "converted checkpoint",
        FAIL,
        ["model.init_from is missing"],
    ),
    "half-converted": (
        [],
        lambda p: (p / CONVERTED / "endprompt.json").unlink(),
        "converted checkpoint",
        FAIL,
        ["megatron: holds no complete checkpoint"],
    ),
    "converted-cut": (
        [],
        lambda p: cut(p / CONVERTED / "__0_0.distcp", 1000),
        "converted checkpoint",
        FAIL,
        ["__0_0.distcp has", "damaged"],
    ),
    "converted-part-missing": (
        [],
        lambda p: (p / CONVERTED / "__0_0.distcp").unlink(),
        "converted checkpoint",
        FAIL,
        ["__0_0.distcp is missing"],
    ),
    "converted-metadata-cut": (
        [],
        lambda p: cut(p / CONVERTED / ".metadata", 50),
        "converted checkpoint",
        FAIL,
        [".metadata cannot be read"],
    ),
    "converted-from-another": (
        [],
        of_three_layers,
        "converted checkpoint",
        FAIL,
        ["another model: num_layers=3, model.hf has 4"],
    ),
    "tokenizer-of-another": ([], larger_tokenizer, "tokenizer", FAIL, ["token id 900", "vocab_size=320"]),
    "no-tokenizer": (
        [],
        lambda p: [path.unlink() for path in (p / "hf").glob("tokenizer*")],
        "tokenizer",
        FAIL,
        ["holds no tokenizer"],
    ),
    "prompt-fills-the-sequence": (["context.physical=32"], lambda p: None, "tokenizer", FAIL, ["leaves no context"]),
    "data-of-another": (
        ["data.train=foreign"],
        lambda p: None,
        "data",
        FAIL,
        ["foreign: token id 399", "vocabulary of 320"],
    ),
    "data-with-another-tokenizer": ([], other_tokenizer, "data.train", WARN, ["train was prepared with another"]),
    "data-missing": (["data.train=nowhere"], lambda p: None, "data", FAIL, ["nowhere.idx: no such file"]),
    "bin-cut": ([], lambda p: cut(p / "train.bin", 10), "data", FAIL, ["train.bin: 7990 bytes", "expects 8000"]),
    "idx-cut": ([], lambda p: cut(p / "train.idx", 4), "data", FAIL, ["train.idx: cut short"]),
    "idx-pointer": ([], lambda p: edit_idx(p, 38, 2), "data", FAIL, ["train.idx: its pointers"]),
    "idx-documents": ([], lambda p: edit_idx(p, 54, 9), "data", FAIL, ["train.idx: its pointers"]),
    "data-short": (["data.train=short"], lambda p: None, "data", FAIL, ["20 tokens are less than one sample"]),
    "valid-of-another": (["data.valid=foreign"], lambda p: None, "data", FAIL, ["data.valid=foreign: token id 399"]),
    "data-repeats": (["train.steps=100"], lambda p: None, "data.train", WARN, ["5.00 epochs in 100 steps", "again"]),
    "recipe-illegal": (
        ["parallel.pipeline=3"],
        lambda p: None,
        "recipe",
        FAIL,
        ["parallel.pipeline=3", "num_hidden_layers=4"],
    ),
    "run-in-the-way": (["checkpoint.dir=file/run"], lambda p: None, "run directory", FAIL, ["cannot be written"]),
    "disk-too-small": (["checkpoint.keep=0", "train.steps=100000000"], lambda p: None, "free disk", FAIL, ["needed"]),
    "fp8-without-gpu": (["precision.fp8=hybrid"], lambda p: None, "GPUs", FAIL, ["precision.fp8=hybrid"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_every_other_check_runs(case, place, at, monkeypatch):
    overrides, damage, check, verdict, needles = WRONG[case]
    damage(place)
    found, code = at(place, *overrides)
    assert check in found, found
    assert found[check].verdict == verdict, found[check]
    for needle in needles:
        assert needle in found[check].found, f"{needle!r} is not in: {found[check].found}"
    assert code == (2 if verdict == FAIL else 0), found
    assert set(found) | {"data", "data.train"} >= EVERY_CHECK


def test_without_a_config_what_needs_the_shape_says_why_it_did_not_run(place, at):
    found, code = at(place, "context.original=64", "model.hf=nowhere")
    assert code == 2
    assert "nowhere" in found["HF checkpoint"].found
    assert found["HF checkpoint"].verdict == FAIL
    for check in ("tokenizer", "data", "free disk", "converted checkpoint"):
        assert (found[check].verdict, "config.json" in found[check].found) == (NOT_RUN, True)
    assert found["run directory"].verdict == OK


def test_a_full_disk_is_said_with_what_is_needed(place, at, tmp_path):
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


def test_room_is_counted_for_the_checkpoints_that_are_kept(place, monkeypatch):
    monkeypatch.chdir(place)

    def kept(*overrides: str) -> int:
        return checkpoints_kept(load_recipe("recipe.yaml", overrides))

    assert kept("train.steps=1000", "checkpoint.interval=100", "checkpoint.keep=2") == 3
    assert kept("train.steps=1000", "checkpoint.interval=100", "checkpoint.keep=0") == 10
    # 400 and 800 stay beside 900 and 1000.
    assert kept("train.steps=1000", "checkpoint.interval=100", "checkpoint.keep=2", "checkpoint.keep_every=400") == 5
    assert kept("train.steps=50", "checkpoint.interval=100", "checkpoint.keep=2") == 1


def test_the_predicted_size_of_a_checkpoint_is_the_size_of_one(place, extend, monkeypatch):
    ran = extend(place, "recipe.yaml", "train.steps=3")
    assert ran.returncode == 0, ran.stderr
    (written,) = (place / "run/checkpoints").glob("iter_*")
    held = sum(path.stat().st_size for path in written.glob("*.distcp"))
    monkeypatch.chdir(place)
    predicted = checkpoint_bytes(load_recipe("recipe.yaml"), read_shape("hf"))
    assert held == pytest.approx(predicted, rel=0.1)  # tensors of 64 numbers beside their headers


def test_a_run_that_goes_on_is_said_and_must_be_of_this_recipe(place, at, extend):
    ran = extend(place, "recipe.yaml", "train.steps=3")
    assert ran.returncode == 0, ran.stderr
    found, code = at(place)
    assert (code, found["converted checkpoint"].verdict) == (0, OK)
    assert "goes on from step 3 of 10" in found["converted checkpoint"].found
    found, code = at(place, "context.method=pose")
    assert (code, found["converted checkpoint"].verdict) == (2, FAIL)
    assert "context.method=pose but run/checkpoints/iter_0000003 was trained with end_prompt" in (
        found["converted checkpoint"].found
    )


def test_a_damaged_newest_checkpoint_goes_back_to_the_one_before(place, at, extend):
    ran = extend(place, "recipe.yaml", "train.steps=4", "checkpoint.interval=2", "optim.warmup_steps=1")
    assert ran.returncode == 0, ran.stderr
    cut(place / "run/checkpoints/iter_0000004/__0_0.distcp", 10)
    found, code = at(place)
    assert (code, found["converted checkpoint"].verdict) == (0, WARN)
    assert "iter_0000004: __0_0.distcp: missing or cut short" in found["converted checkpoint"].found
    assert "goes back to step 2" in found["converted checkpoint"].found
    shutil.rmtree(place / "run/checkpoints/iter_0000002")
    found, code = at(place)
    assert (code, found["converted checkpoint"].verdict) == (2, FAIL)


def test_a_run_directory_in_use_is_refused_and_one_that_was_left_is_not(place, at):
    holder = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import time\n"
    holder += "from endprompt_megatron.run_lock import RunLock\n"
    holder += "RunLock(Path('run')).acquire(); print('held', flush=True); time.sleep(120)"
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
    [(79.6, OK, "79.6 GiB on the smallest GPU"), (3.0, WARN, "closer than"), (0.5, FAIL, "tools/plan.py")],
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


def test_a_large_dataset_is_sampled(place, at, monkeypatch):
    """A token that no model knows, somewhere in 400 windows of which 256 are read: its run is longer than a window."""
    count = 400 * 65536
    tokens = np.full(count, 7, dtype=np.uint16)
    tokens[200 * 65536 : 203 * 65536] = 321
    tokens.tofile(place / "train.bin")
    from endprompt_megatron.data.indexed import write_idx

    write_idx(place / "train.idx", np.array([count]), np.dtype(np.uint16))
    found, code = at(place)
    assert (code, found["data"].verdict) == (2, FAIL)
    assert "token id 321" in found["data"].found


def test_a_tied_model_with_a_second_copy_is_whole(tmp_path, at, place):
    shutil.rmtree(place / "hf")
    small_llama(place / "hf", tie_word_embeddings=True)
    found, _ = at(place)
    assert found["HF checkpoint"].verdict == OK


def test_a_login_node_checks_for_the_cluster(place, at):
    found, code = at(place, "parallel.tensor=2", "parallel.pipeline=2")
    assert "legal on 4 processes (the fewest of this layout" in found["recipe"].found
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
def test_wrong_input_is_one_line(place, arguments, needles):
    assert_one_line_error(run_tool("preflight", place / arguments[0], *arguments[1:]), *needles)


def test_a_rank_that_reaches_no_one_says_so_in_one_line(place):
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place), "--timeout", "2", env=env)
    assert_one_line_error(result, "rank 1", "127.0.0.1:1", "within 2 s")


def test_a_rank_that_does_not_come_is_named_and_the_rest_is_checked(place):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = run_tool("preflight", place / "recipe.yaml", *absolute(place), "--timeout", "2", "--json", env=env)
    assert result.returncode == 2, result.stderr
    found = {check["check"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["processes"]["verdict"] == FAIL
    assert "rank 1 did not come within 2 s" in found["processes"]["found"]
    assert (found["all-reduce"]["verdict"], found["data.train"]["verdict"]) == (NOT_RUN, OK)
    assert not (place / "run").exists()
