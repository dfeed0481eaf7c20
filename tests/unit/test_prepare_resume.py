"""Preparing data that is killed, interrupted, out of disk or started twice: the same bytes, or one line."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import ROOT, assert_one_line_error, file_system_of, run_tool, small_tokenizer
from unit.preparing import three_files, write_corpus

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus import chunks, finish, prepare, tokenise
from endprompt_megatron.data.corpus.filters import Filters

FILTERS = Filters(max_tokens=150, dedup=True, held_out=0.3)
OUTPUTS = ("", "-valid")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Many pieces, and a record of what is joined after each."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1500)
    monkeypatch.setattr(finish, "_RECORD_BYTES", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, a tokenizer, and the dataset that comes of them."""
    place = tmp_path_factory.mktemp("resume")
    small_tokenizer(place / "tokenizer", 300)
    files, _ = write_corpus(place)
    more = place / "more.jsonl"  # copies of what was there before
    more.write_bytes((place / "two.jsonl").read_bytes() * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_CHUNK_BYTES", 1500)
        call(place, place / "whole", [*files, str(more)])
    return place


def inputs(place: Path) -> list[str]:
    return [str(place / name) for name in ("one.txt", "two.jsonl", "three.jsonl.gz", "four.jsonl.zst", "five.parquet")]


def call(place: Path, out: Path, files: list[str] | None = None, **options) -> dict:
    options = {"filters": FILTERS, "workers": 1, **options}
    files = files or [*inputs(place), str(place / "more.jsonl")]
    return prepare.prepare(files, str(place / "tokenizer"), str(out), **options)


def assert_same(place: Path, out: Path) -> None:
    for output in OUTPUTS:
        assert three_files(f"{out}{output}") == three_files(f"{place}/whole{output}")
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == sorted(f"{out.name}{output}{suffix}" for output in OUTPUTS for suffix in (".bin", ".idx", ".json"))


def slow() -> None:
    """In a child: wait a little before every step, so that a kill falls between and into all of them."""
    for module, name in (
        (tokenise, "tokenise_chunk"),
        (finish, "_copy"),
        (finish, "_copy_some"),
        (finish, "write_json"),
    ):
        original = getattr(module, name)

        def slowly(*arguments, original=original):
            time.sleep(0.01)
            return original(*arguments)

        setattr(module, name, slowly)


@pytest.mark.parametrize("attempt", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 10))])
def test_preparing_killed_at_random_moments_ends_with_the_same_bytes(place, tmp_path, draws, attempt):
    kills, staging = 0, tmp_path / ".out.partial"
    ended = False
    while not ended:
        child = os.fork()
        if child == 0:  # no exec: the tokenizer's library is loaded already
            code = 1
            try:
                slow()
                call(place, tmp_path / "out")
                code = 0
            finally:
                os._exit(code)
        # Count from when it began to work.
        while not staging.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        time.sleep(draws.uniform(0.02, 0.3) * (1 + kills / 10))  # on a busy machine, too, it ends
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        ended = os.WIFEXITED(status)
        kills += not ended
        if not ended and (tmp_path / "out.idx").exists() and not (staging / ".finishing.json").exists():
            shutil.rmtree(staging, ignore_errors=True)  # all was done but to remove an empty directory
            break
    assert not ended or os.WEXITSTATUS(status) == 0
    assert kills, "it was never killed"
    assert_same(place, tmp_path / "out")


class Steps:
    """Interrupts at the n-th change of the file system; counts them all with n = None."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.count, self.at = 0, at
        for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "write_text"), (os, "fsync")):
            patch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, original):
        def step(*arguments, **options):
            if self.count == self.at:
                raise KeyboardInterrupt
            self.count += 1
            return original(*arguments, **options)

        return step


def test_preparing_interrupted_before_any_step_ends_with_the_same_bytes(place, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch)
        call(place, tmp_path / "all" / "out")
    assert steps.count > 150
    generator = random.Random(1)
    # Every step of the end, where the files get their names, and some of those before.
    for at in [*sorted(generator.sample(range(steps.count - 14), 25)), *range(steps.count - 14, steps.count)]:
        out = tmp_path / str(at) / "out"
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, at)
            with pytest.raises(KeyboardInterrupt):
                call(place, out)
        call(place, out)
        assert_same(place, out)


def interrupted(place: Path, out: Path, module, name: str, after: int) -> Path:
    """What a run leaves that is interrupted after some calls of a function."""
    original, calls = getattr(module, name), []

    def counted(*arguments):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counted)
        with pytest.raises(KeyboardInterrupt):
            call(place, out)
    return out.parent / f".{out.name}.partial"


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """Numbers of the pieces that are tokenised from here on."""
    original, numbers = tokenise.tokenise_chunk, []
    monkeypatch.setattr(
        tokenise, "tokenise_chunk", lambda job, number, *more: numbers.append(number) or original(job, number, *more)
    )
    return numbers


def test_complete_chunks_are_kept_and_damaged_ones_tokenised_again(place, tmp_path, tokenised):
    staging = interrupted(place, tmp_path / "out", tokenise, "tokenise_chunk", 7)
    records = sorted(staging.glob(".piece_*.json"))
    done = [int(path.stem.split("_")[1]) for path in records]
    assert len(done) == 7
    damaged = done[:5]
    flipped, cut, lost, unrecorded, broken = (staging / f"{number:05d}.bin" for number in damaged)
    flipped.write_bytes(b"?" + flipped.read_bytes()[1:])
    os.truncate(cut, 3)
    lost.unlink()
    records[3].unlink()
    records[4].write_text("{")
    assert unrecorded.exists()
    assert broken.exists()
    tokenised.clear()
    call(place, tmp_path / "out")
    assert not set(done[5:]) & set(tokenised)
    assert set(damaged) <= set(tokenised)
    assert_same(place, tmp_path / "out")


@pytest.mark.parametrize("damage", [None, "cut", "flipped", "gone"])
def test_preparing_killed_while_joining_continues_from_what_is_joined(place, tmp_path, tokenised, damage):
    staging = interrupted(place, tmp_path / "out", finish, "_copy", 6)
    joined = staging / "joined.bin"
    done = json.loads((staging / ".joined.json").read_text())
    assert len(done) >= 6
    assert not (staging / "00000.bin").exists()  # the corpus is not there twice
    size = sum(count for count, _ in done)
    content = joined.read_bytes()
    if damage == "cut":
        os.truncate(joined, size - 1)
    elif damage == "flipped":
        joined.write_bytes(content[: size // 2] + bytes([content[size // 2] ^ 1]) + content[size // 2 + 1 :])
    elif damage == "gone":
        joined.unlink()
    tokenised.clear()
    call(place, tmp_path / "out")
    assert bool(tokenised) == (damage is not None)
    assert_same(place, tmp_path / "out")


@pytest.mark.parametrize("change", ["input", "touched", "order", "options", "tokenizer", "workers"])
def test_preparing_begins_anew_only_when_arguments_or_inputs_changed(place, tmp_path, tokenised, change, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(place, here)
    files = [*inputs(here), str(here / "more.jsonl")]
    out = tmp_path / "out" / "out"
    original = tokenise.tokenise_chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            call(here, out, files)
    assert tokenise.tokenise_chunk is original
    count = len(tokenised)
    tokenised.clear()
    options = {}
    if change == "input":
        with open(here / "two.jsonl", "a") as file:
            file.write('{"text": "more"}\n')
    elif change == "touched":
        os.utime(here / "two.jsonl", (1, 1))
    elif change == "order":
        files = files[::-1]
    elif change == "options":
        options = {"eos": False}
    elif change == "tokenizer":
        small_tokenizer(here / "tokenizer", 290)
    else:
        options = {"workers": 2}
    call(here, out, files, **options)
    assert (len(tokenised) >= count) == (change != "workers")
    assert sorted(path.name for path in out.parent.iterdir())[0] == "out-valid.bin"


def test_wrong_input_removes_what_an_earlier_start_left(place, tmp_path):
    interrupted(place, tmp_path / "out", tokenise, "tokenise_chunk", 3)
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    with pytest.raises(InputError, match="not JSON"):
        call(place, tmp_path / "out", [*inputs(place), str(tmp_path / "bad.jsonl")])
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_preparing_an_output_twice_at_once_is_refused(place, tmp_path):
    staging = interrupted(place, tmp_path / "out", tokenise, "tokenise_chunk", 3)
    with open(staging / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing it"):
            call(place, tmp_path / "out")
        assert len(list(staging.glob(".piece_*"))) == 3
    call(place, tmp_path / "out")
    assert_same(place, tmp_path / "out")
    with pytest.raises(InputError, match=r"out\.bin: already exists"):
        call(place, tmp_path / "out")


def test_two_prepare_data_at_once_give_one_dataset_and_one_error_line(place, tmp_path):
    command = [sys.executable, str(ROOT / "tools/prepare_data.py"), "--input", *inputs(place)]
    command += ["--tokenizer", str(place / "tokenizer"), "--out", str(tmp_path / "out"), "--workers", "1"]
    first, second = (subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2))
    ends = [(process.communicate()[1], process.returncode) for process in (first, second)]
    assert sorted(code for _, code in ends) == [0, 2]
    [said] = [error for error, code in ends if code == 2]
    assert len(said.splitlines()) == 1
    assert "another process is writing it" in said or "already exists" in said
    assert len(list(tmp_path.iterdir())) == 3


def test_workers_end_with_their_killed_parent_and_preparing_continues(place, tmp_path, monkeypatch):
    """All at once: nothing is left running, and the lock is free."""
    big = tmp_path / "big.jsonl"
    big.write_bytes((place / "two.jsonl").read_bytes() * 400)
    entry = tmp_path / "entry.py"  # what the tool does, in smaller pieces
    entry.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from endprompt_megatron.data.corpus import chunks, prepare\n"
        "chunks._CHUNK_BYTES = 40_000\nif __name__ == '__main__':\n"
        "    prepare.prepare(sys.argv[1:2], *sys.argv[2:], workers=2)\n"
    )
    command = [sys.executable, str(entry), str(big), str(place / "tokenizer"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    staging = tmp_path / ".out.partial"
    while len(list(staging.glob(".piece_*.json"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(staging.glob(".piece_*.json"))
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 40_000)
    call(place, tmp_path / "again", [str(big)], filters=None)
    assert three_files(tmp_path / "out") == three_files(tmp_path / "again")
    assert not staging.exists()


@pytest.mark.parametrize("share", [0.3, 1.3], ids=["tokenising", "joining"])
def test_a_full_disk_while_preparing_is_one_line_and_leaves_nothing(place, tmp_path, share):
    big = tmp_path / "big.jsonl"
    big.write_bytes((place / "two.jsonl").read_bytes() * 100)
    arguments = ["--input", big, "--tokenizer", place / "tokenizer", "--workers", 1, "--out"]
    assert run_tool("prepare_data", *arguments, tmp_path / "whole").returncode == 0
    size = sum((tmp_path / f"whole{suffix}").stat().st_size for suffix in (".bin", ".idx"))
    with file_system_of(tmp_path / "disk", f"{int(size * share) // 1024}k") as disk:
        assert_one_line_error(run_tool("prepare_data", *arguments, disk / "out"), "out: no space left on the disk")
        assert list(disk.iterdir()) == []
