"""make gpu and its kit, without a GPU: a rehearsal says so, and a kit comes out as it was packed or is refused."""

import argparse
import importlib
import json
import struct
import subprocess
import sys

import pytest
from small import ROOT

from endprompt_megatron.common.errors import InputError


@pytest.fixture
def kit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("gpu_kit")
    monkeypatch.setattr(module, "GPU", tmp_path)
    monkeypatch.setattr(module, "KIT", tmp_path / "kit")
    for site in module.SITES:
        (tmp_path / site / "package").mkdir(parents=True)
        (tmp_path / site / "package" / "data.bin").write_bytes(bytes(range(256)) * 5000 + site.encode())
    return module


def pack(kit, **options):
    kit.pack(argparse.Namespace(**{"piece": 1, "torch": "2.11.0", "arch": 90} | options))


def test_a_kit_is_unpacked_as_it_was_packed(kit, tmp_path, monkeypatch):
    import random

    noise = random.Random(0).randbytes(2_500_000)  # three pieces
    (tmp_path / "site" / "noise").write_bytes(noise)
    pack(kit)
    assert len(list((tmp_path / "kit").glob("kit-*"))) == 3
    (tmp_path / "site" / "noise").write_bytes(b"")
    kit.unpack()
    assert (tmp_path / "site" / "noise").read_bytes() == noise
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit", "site", "site-te"]


def test_an_incomplete_or_wrong_kit_is_refused_in_one_line(kit, tmp_path):
    with pytest.raises(InputError, match="make gpu-kit"):
        kit.unpack()
    pack(kit)
    about = json.loads((tmp_path / "kit" / "kit.json").read_text())
    piece = tmp_path / "kit" / "kit-000"
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] + b"x")
    with pytest.raises(InputError, match="checksum"):
        kit.unpack()
    piece.unlink()
    with pytest.raises(InputError, match="kit-000 of 1"):
        kit.unpack()
    (tmp_path / "kit" / "kit.json").write_text(json.dumps({**about, "python": "3.9"}))
    with pytest.raises(InputError, match=r"for Python 3\.9"):
        kit.unpack()


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0, 64, len(payload)).ljust(28, b"\0") + struct.pack("<I", architecture)
    return header.ljust(64, b"\0") + payload


def test_code_for_other_gpus_is_zeroed_and_nothing_else(kit, tmp_path):
    entries = entry(2, 80, b"A" * 40) + entry(2, 90, b"H" * 40) + entry(1, 90, b"q" * 40)
    fat = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    not_one = struct.pack("<IHHQ", 0xBA55ED50, 7, 16, 8) + b"untouched"
    library = tmp_path / "lib.so"
    library.write_bytes(b"before" + fat + not_one)
    kit.keep_architecture(library, 90)
    found = library.read_bytes()
    assert len(found) == len(b"before" + fat + not_one)
    assert (found.count(b"A"), found.count(b"H"), found.count(b"q")) == (0, 40, 0)
    assert found.startswith(b"before")
    assert found.endswith(not_one)


def test_names_of_a_freeze_are_compared_as_pip_does(kit, tmp_path):
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("Typing_Extensions==4.15.0\nmy.pkg @ file:///x\n\n")
    assert kit.names_in(freeze) == {"typing-extensions", "my-pkg"}
    with pytest.raises(InputError, match="pip freeze"):
        kit.names_in(tmp_path / "none")


def test_the_page_shows_what_failed_and_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = importlib.import_module("gpu_page").page
    test = {"outcome": "failed", "reason": "AssertionError: <scales>", "properties": {"peak_gib": 1.5}}
    timed = dict(seconds=2.0, range=[1.9, 2.1], tokens_per_s=100.0, tflops=5.0, peak_gib=3.0, planned_gib=2.9)
    html = page(
        {
            "about": {"gpus": ["NVIDIA H100"], "torch": "2.11"},
            "tests": {"with": {"tests/gpu/test_a_gpu.py::test_b": test}},
            "benchmarks": {
                "ours": {"name": "ours", **timed},
                "theirs": {"name": "theirs", "error": "no time was left"},
            },
        }
    )
    for said in (
        "1 x NVIDIA H100",
        "AssertionError: &lt;scales&gt;",
        "peak_gib",
        "2.000 s",
        "2.9 GiB",
        "no time was left",
    ):
        assert said in html


@pytest.mark.full
def test_without_a_gpu_it_is_a_rehearsal_that_says_so(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--out", tmp_path, "--workers", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    tests = [test for suite in found["tests"].values() for test in suite.values()]
    assert len(tests) > 50
    assert {test["outcome"] for test in tests} == {"skipped"}
    assert {each["error"] for each in found["benchmarks"].values()} == {"needs an NVIDIA GPU"}
    assert "a rehearsal, in which nothing was measured" in (tmp_path / "results.html").read_text()
