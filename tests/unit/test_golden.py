"""What version 0.1.0 wrote is read, resumed and continued today: tests/golden/make.py says what each fixture is.

Everything goes through the tools, in a process of its own as training needs one; imports are few on purpose.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
from small import ROOT

GOLDEN = ROOT / "tests" / "golden"
RECORDED = json.loads((GOLDEN / "recorded.json").read_text())


def tool_here(name: str, directory: str, arguments: list[str]) -> tuple[int, str, str]:
    """tools/NAME.py in this process, started in `directory`: exit code, stdout, stderr."""
    import contextlib
    import runpy
    import sys

    os.chdir(directory)
    sys.argv = [f"{name}.py", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
    return code or 0, out.getvalue(), err.getvalue()


@pytest.fixture
def tool(process, tmp_path):
    """A tool with its arguments, started where the archive was unpacked; returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        code, out, err = process.run(1, tool_here, name, str(tmp_path), [*map(str, arguments)])[0]
        assert code == 0, f"{name} ended with {code}:\n{err}{out}"
        return out

    return run


@pytest.fixture
def unpack(tmp_path):
    """Unpack a fixture; returns its place and what was recorded of it."""

    def unpacked(name: str) -> tuple[Path, dict]:
        with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path, RECORDED[name]

    return unpacked


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def tensors(directory: Path) -> dict[str, str]:
    """Checksums of a Hugging Face directory's tensors by name: dtype, shape and every bit."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, value in load_file(path).items():
            digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            found[name] = digest.hexdigest()[:16]
    return found


def steps_of(run: Path) -> list[list]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[line["step"], line["loss"], line["grad_norm"]] for line in lines if "loss" in line]


def test_a_stored_training_checkpoint_is_described_and_its_checksums_are_checked(unpack, tool):
    place, recorded = unpack("run")
    found = json.loads(tool("inspect_checkpoint", "run/checkpoints", "--json"))
    for key in ("path", "step", "files", "tensors"):
        assert found.get(key) == recorded["inspected"].get(key), key
    assert found["model"]["parameters"] == "8,144"
    tool("inspect_checkpoint", "run/checkpoints", "--check")
    file = place / "run/checkpoints/iter_0000004/__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(AssertionError, match="ended with 2"):
        tool("inspect_checkpoint", "run/checkpoints", "--check")


@pytest.mark.parametrize(("run", "exported"), [("run", "exported"), ("adapters", "merged")])
def test_a_stored_training_checkpoint_exports_the_recorded_weights(unpack, tool, run, exported):
    place, recorded = unpack("run")
    recorded = recorded if run == "run" else recorded["adapters"]
    tool("convert_megatron_to_hf", "--megatron", f"{run}/checkpoints", "--out", "out", "--workers", 1)
    assert tensors(place / "out") == recorded[exported]
    config = json.loads((place / "out/config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    assert config["rope_parameters"]["rope_type"] == "linear"


def test_a_stored_run_of_two_pipeline_stages_resumes_in_one_with_the_recorded_losses(unpack, tool):
    place, recorded = unpack("run")
    before = steps_of(place / "run")
    assert [step for step, *_ in before] == [1, 2, 3, 4, 5, 6], "killed in step 7"
    tool("extend", "recipe.yaml", *recorded["overrides"], "parallel.pipeline=1")
    found = steps_of(place / "run")
    assert found[:4] == before[:4] == recorded["steps"][:4]
    assert [step for step, *_ in found] == [step for step, *_ in recorded["steps"]]
    for (_, loss, norm), (step, expected, expected_norm) in zip(found[4:], recorded["steps"][4:], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), step
        assert norm == pytest.approx(expected_norm, rel=1e-3), step
    assert (place / "run/checkpoints/iter_0000012/endprompt.json").is_file()


def test_a_stored_finished_run_of_adapters_is_known_to_be_done(unpack, tool):
    place, recorded = unpack("run")
    assert "done already" in tool("extend", "recipe.yaml", *recorded["adapters"]["overrides"])
    assert steps_of(place / "adapters") == recorded["adapters"]["steps"]


def test_a_stored_conversion_converts_back_to_the_recorded_weights(unpack, tool):
    place, recorded = unpack("conversion")
    tool("inspect_checkpoint", "megatron", "--check")
    tool("convert_megatron_to_hf", "--megatron", "megatron", "--out", "new", "--workers", 1, "--verify")
    assert tensors(place / "new") == recorded["tensors"] == tensors(place / "hf")


@pytest.mark.parametrize("out", ["again", "back"])
def test_a_stored_interrupted_conversion_continues_from_the_files_that_are_complete(unpack, tool, out):
    place, recorded = unpack("conversion")
    staging = place / f".{out}.partial"
    job = json.loads((staging / ".job.json").read_text())
    assert job["from"].startswith(recorded["place"])
    # Where it was unpacked is another place than where it was interrupted, which counts as another source.
    job["from"] = job["from"].replace(recorded["place"], str(place.resolve()))
    (staging / ".job.json").write_text(json.dumps(job))
    weights = [path for path in staging.rglob("*") if path.suffix in (".distcp", ".safetensors")]
    kept = {path.relative_to(staging): path.stat().st_mtime_ns for path in weights}
    assert len(kept) == {"again": 1, "back": 2}[out]
    if out == "again":
        tool("convert_hf_to_megatron", "--hf", "hf", "--out", "again", "--workers", 1)
        tool("inspect_checkpoint", "again", "--check")
        shutil.rmtree(place / "megatron")
        tool("convert_megatron_to_hf", "--megatron", "again", "--out", "new", "--workers", 1)
        assert tensors(place / "new") == recorded["tensors"]
        expected = recorded["megatron"]
    else:
        arguments = ("--megatron", "megatron", "--max-shard-size", "5KB", "--workers", 1)
        tool("convert_megatron_to_hf", *arguments, "--out", "back")
        assert tensors(place / "back") == recorded["tensors"]
        expected = recorded["back"]
    for name, changed in kept.items():
        assert (place / out / name).stat().st_mtime_ns == changed, f"{name} was written again"
    data = {name: value for name, value in expected.items() if name.endswith((".distcp", ".safetensors", ".txt"))}
    assert {name: checksum(place / out / name) for name in data} == data


def test_stored_datasets_give_the_recorded_samples(unpack, tool):
    _, recorded = unpack("dataset")
    for name, expected in recorded["samples"].items():
        count = len(expected["samples"])
        found = json.loads(tool("inspect_data", f"{name}.yaml", "--samples", count, "--json"))
        assert found["samples"] == expected["samples"], name
    found = json.loads(tool("inspect_data", "--prefix", "chat", "--tokenizer", "hf", "--samples", 2, "--json"))
    assert found == recorded["documents"]


def test_datasets_prepared_anew_equal_the_stored_ones(unpack, tool):
    place, recorded = unpack("dataset")
    stored = {name: sum_ for name, sum_ in recorded["files"].items() if name.endswith((".bin", ".idx", ".json"))}
    stored = {name: sum_ for name, sum_ in stored.items() if not name.endswith("s.jsonl")}
    assert {name: checksum(place / name) for name in stored} == stored
    manifests = {name: json.loads((place / name).read_text()) for name in stored if name.endswith(".json")}
    for name in stored:
        (place / name).unlink()
    options = ("--tokenizer", "hf", "--workers", 1, "--held-out", 0.2)
    tool("prepare_data", "--input", "texts.jsonl", "--out", "text", "--dedup", "--min-tokens", 40, *options)
    tool("prepare_data", "--input", "chats.jsonl", "--chat", "--out", "chat", *options)
    binary = {name: sum_ for name, sum_ in stored.items() if not name.endswith(".json")}
    assert {name: checksum(place / name) for name in binary} == binary
    for name, manifest in manifests.items():
        anew = json.loads((place / name).read_text())
        checksums = anew.pop("crc32")  # which later versions add
        assert anew == manifest, name
        for suffix, crc32 in checksums.items():
            assert zlib.crc32((place / name.replace(".json", suffix)).read_bytes()) == crc32


@pytest.fixture
def evaluation(unpack) -> tuple[Path, dict[str, bytes], dict]:
    """A stored evaluation: its directory, the files of its answers, and its results."""
    place, _ = unpack("evaluation")
    out = place / "run" / "evaluation"
    return out, answers_of(out), json.loads((out / "results.json").read_text())


def answers_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "answers").iterdir()}


RESAMPLED = ("interval", "over_questions", "p", "beyond_noise")


def assert_same(found: object, stored: object, where: str = "") -> None:
    """All that was stored is there, with the same values; of what is drawn at random only that it is there."""
    if isinstance(stored, dict):
        assert stored.keys() <= found.keys(), where
        for key, value in stored.items():
            if key in RESAMPLED:
                assert (found[key] is None) == (value is None), f"{where}/{key}"
            else:
                assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for number, (one, other) in enumerate(zip(found, stored, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    elif isinstance(stored, float):
        assert found == pytest.approx(stored, rel=1e-9, abs=1e-12), where
    else:
        assert found == stored, where


def assert_same_results(found: dict, stored: dict) -> None:
    for measured in stored["measurements"].values():
        measured.pop("seconds")
        measured["longbench"]["sources"].pop("prompts")  # an absolute path
    assert_same(found, {key: stored[key] for key in ("text", "models", "left_out", "settings")})
    assert_same(found, {key: stored[key] for key in ("measurements", "scores", "comparisons")})


def test_a_stored_evaluation_is_complete_and_asks_nothing_again(evaluation, tool):
    out, answers, stored = evaluation
    (out / "results.json").unlink()
    assert len(stored["measurements"]["extended"]) == 7
    tool("evaluate", *RECORDED["evaluation"]["options"])
    assert answers_of(out) == answers
    assert_same_results(json.loads((out / "results.json").read_text()), stored)


def test_stored_answers_are_found_by_the_inputs_that_are_made_today(evaluation, tool):
    """Without the list of what was asked, each input's key is computed anew: another input would be asked again."""
    out, answers, stored = evaluation
    shutil.rmtree(out / "asked")
    tool("evaluate", *RECORDED["evaluation"]["options"])
    assert answers_of(out) == answers
    assert_same_results(json.loads((out / "results.json").read_text()), stored)


def test_a_stored_evaluation_that_lost_answers_asks_those_alone_and_gets_the_recorded_ones(evaluation, tool):
    out, answers, _ = evaluation
    shutil.rmtree(out / "asked")
    name = "extended.0-of-1.jsonl"
    lines = answers[name].splitlines(keepends=True)
    lost = [line for line in lines if json.loads(line)["suite"] in ("perplexity", "recall", "longbench")]
    kept = [line for line in lines if line not in lost]
    (out / "answers" / name).write_bytes(b"".join(kept))
    tool("evaluate", *RECORDED["evaluation"]["options"])
    found = (out / "answers" / name).read_bytes().splitlines(keepends=True)
    assert found[: len(kept)] == kept
    records = {line["key"]: line["record"] for line in map(json.loads, found[len(kept) :])}
    expected = {line["key"]: line["record"] for line in map(json.loads, lost)}
    assert records.keys() == expected.keys()
    for key, record in expected.items():
        assert flat(records[key]) == pytest.approx(flat(record), rel=1e-4), record


def flat(value: object) -> list:
    """Numbers of a record in their order; texts are left to those."""
    if isinstance(value, dict):
        return [each for key in sorted(value) for each in flat(value[key])]
    if isinstance(value, list):
        return [each for inner in value for each in flat(inner)]
    return [value] if isinstance(value, int | float) else []


def test_a_stored_evaluation_and_run_become_a_report_with_the_recorded_numbers(evaluation, tool):
    out, _, stored = evaluation
    assert tool("report", "run").strip() == str(Path("run") / "report.html")
    page = (out.parent / "report.html").read_text()
    text = re.sub(r"<[^>]*>", " ", page)
    for label in ("baseline", "extended"):
        measured = stored["measurements"][label]
        for entry in measured["perplexity"]["by_length"]:
            assert f"{entry['perplexity']:.1f}" in text
        for score in stored["scores"][label]:
            if (score["suite"], score["task"]) in (("ruler", "mean"), ("longbench", "mean_21")):
                assert f"{100 * score['score']:.1f}" in text
    losses = [
        step for step in map(json.loads, (out.parent / "metrics.jsonl").read_text().splitlines()) if "loss" in step
    ]
    assert f"{losses[-1]['consumed_tokens']:,}" in text


def numbers(page: str) -> list[str]:
    """Numbers in the tables of a page in Markdown."""
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [number for row in rows for number in re.findall(r"[-+±]?\d[\d,.]*%?", row)]


def test_a_stored_study_is_done_and_compares_to_the_stored_comparison(unpack, tool):
    place, recorded = unpack("study")
    stored = json.loads((place / "study/study.json").read_text())
    page = (place / "study/study.md").read_text()
    states = [line.split() for line in tool("study", "study.yaml", "--list").splitlines()[2:] if line.strip()]
    assert len(states) == 5
    assert [(state[0], state[-1]) for state in states] == [
        (line.split()[0], "done") for line in recorded["listed"][2:] if line.strip()
    ]
    assert numbers(tool("study", "study/study.json")) == numbers(page)
    for name in ("study.json", "study.md", "study.html"):
        (place / "study" / name).unlink()
    assert "5 of 5" in tool("study", "study.yaml")
    assert_same(json.loads((place / "study/study.json").read_text()), stored)
    assert len(numbers((place / "study/study.md").read_text())) == len(numbers(page))
    assert (place / "study/study.html").read_text().count("<table") == page.count("\n## ")


def test_the_published_study_is_read(process, tmp_path):
    """benchmarks/study/results.json, stored by 0.1.0: its page has every row of it."""
    stored = ROOT / "benchmarks" / "study" / "results.json"
    code, page, err = process.run(1, tool_here, "study", str(tmp_path), [str(stored)])[0]
    assert code == 0, err
    for row in json.loads(stored.read_text())["rows"]:
        assert page.count(f"| {row['name']} |") >= 3, row["name"]
