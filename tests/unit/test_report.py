"""The report: one page that fetches nothing, nests properly, says what was measured and what is missing."""

import html.parser
import json
import re

import pytest
import small

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.requests import responses
from endprompt_megatron.evaluate.suites import perplexity
from endprompt_megatron.method.positions import MAPS
from endprompt_megatron.report import run_files
from endprompt_megatron.report.page import write_report
from endprompt_megatron.report.sections import distance_coverage

RECIPE = """
model: {hf: /nowhere/<b>model</b>}
context: {method: METHOD, original: 64, target: 256, physical: 64, prompts: [EP_1], chunks: 2}
train: {global_batch_size: 2, seed: 1}
optim: {lr: 2.0e-4}
precision: {dtype: bfloat16}
"""
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Nesting(html.parser.HTMLParser):
    """Raises on a tag that closes what is not open; keeps text, attributes and ids."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.attributes, self.ids = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def lines(validation=True):
    for step in range(1, 31):
        yield {
            "step": step,
            "consumed_samples": 2 * step,
            "consumed_tokens": 128 * step,
            "loss": 4.0,
            "loss_context": 4.25,
            "loss_prompt": 2.0 / step,
            "grad_norm": None if step == 3 else 1.0 + 1 / step,
            "lr": 2e-4,
            "tokens_per_s": 4321.0,
            "memory_gib": 1.5,
            "mfu": None,
            "skipped_steps": 1,
        }
        if validation and step % 15 == 0:
            probe = {str(distance): {"loss": 2.0 + distance / 256, "accuracy": 0.5} for distance in (64, 128, 256)}
            yield {"step": step, "valid_loss": 4.1234, "valid_loss_context": 4.2, "virtual": probe}


def results(shift=0.0, labels=("baseline", "extended"), **settings):
    def losses(base):
        return {
            "length": 48,
            "loss": base,
            "stderr": 0.05,
            "perplexity": 31.7 + base,
            "windows": [base, base],
        }

    def measured(shift):
        entries = [losses(2.0 + shift), losses(2.5 + shift) | {"length": 128}]
        buckets = [
            {"start": 16 * i, "end": 16 * i + 16, "loss": 2.0, "stderr": None, "perplexity": 7.4 + shift}
            for i in range(8)
        ]
        answer = {
            "key": "12345",
            "answer": "</td><script>",
            "correct": True,
            "recalled": True,
            "logprob": -0.1,
            "ranks": [0],
        }
        cells = [
            {"length": length, "depth": 0.5, "samples": 1, "accuracy": 1.0, "recall": 1.0, "logprob": -0.12}
            | {"answers": [answer]}
            for length in (48, 128)
        ]
        probe = {"64": {"loss": 1.0, "accuracy": 0.9}, "256": {"loss": 3.0 + shift, "accuracy": 0.37}}
        return {
            "perplexity": {"scored": 16, "by_length": entries, "by_position": buckets},
            "needle": {"filler": "noise", "cells": cells},
            "virtual": {"physical": 64, "samples": 2, "repeat": probe, "continue": probe},
        }

    return {
        "settings": {"lengths": [48, 128], "windows": 2, "needle_lengths": None, "seed": 0} | settings,
        "text": {"sha256": "abc", "tokens": 1000},
        "models": {label: {"window": 64} for label in labels},
        "measurements": {label: measured(shift + (0.5 if label == "baseline" else 0)) for label in labels},
    }


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "a & <run>"
    directory.mkdir()
    (directory / "recipe.yaml").write_text(RECIPE.replace("METHOD", "end_prompt"))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    return directory


def evaluated(directory, value):
    (directory / "evaluation").mkdir(parents=True)
    (directory / "evaluation" / "results.json").write_text(json.dumps(value))


def checked(page):
    """The page's visible text, after the checks that hold for every page."""
    parsed = Nesting(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith(("#", "data:")), (name, value)
    for reference in re.findall(r"url\(([^)]*)\)", page):
        assert reference.startswith("#"), reference
        assert reference[1:] in parsed.ids
    assert "@import" not in page
    assert not re.search(r"#0102\d\d", page)  # every placeholder colour became a variable
    return " ".join(" ".join(parsed.text).split())


def test_report_is_self_contained_nested_and_carries_the_numbers(run):
    evaluated(run, results())
    page = write_report([run]).read_text()
    text = checked(page)
    # steps, tokens, context loss, speed, memory, validation loss, perplexities before and after, passkey, probe
    for number in ("30", "3,840", "4.250", "4,321", "1.5 GiB", "4.1234", "34.2", "33.7", "1 of 1", "37%", "-0.12"):
        assert number in text, number
    assert "1 updates were skipped" in text
    assert "no control was given" in text
    assert "Real inputs between 128 and 256 tokens" in text
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_report_escapes_text_from_files(run):
    evaluated(run, results())
    page = write_report([run]).read_text()
    assert "<b>model</b>" not in page
    assert "&lt;b&gt;model&lt;/b&gt;" in page
    assert "a &amp; &lt;run&gt;" in page
    assert "<script" not in page


def test_report_names_what_is_missing(run):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(validation=False)))
    text = checked(write_report([run]).read_text())
    for sentence in (
        "No evaluation yet",
        "Perplexity was not measured",
        "Virtual distance was not measured",
        "No validation was run",
    ):
        assert sentence in text
    (run / "metrics.jsonl").unlink()
    assert "no metrics.jsonl" in checked(write_report([run]).read_text())
    evaluated(run, results(labels=("extended",)))
    (run / "recipe.yaml").unlink()
    text = checked(write_report([run]).read_text())
    assert "no recipe and no training" in text
    assert "no baseline was measured" in text


@pytest.mark.parametrize("method", MAPS)
def test_report_has_distances_of_every_method(run, method):
    (run / "recipe.yaml").write_text(RECIPE.replace("METHOD", method))
    found = distance_coverage.distance_coverage(run_files.read_run(run))
    text = checked(write_report([run]).read_text())
    if method == "end_prompt":  # a = 52, b = 12, L = 256: supervised are [0, 51] and [193, 255]
        assert found.gaps == [(52, 192)]
        assert "largest gap being 52 to 192" in text
    if method == "full":
        assert found.gaps == []
    assert ("no control was given" in text) == method.startswith("end_prompt")


def test_report_shows_the_control_beside_the_run(run, tmp_path):
    evaluated(run, results())
    control = tmp_path / "control"
    control.mkdir()
    (control / "recipe.yaml").write_text(RECIPE.replace("METHOD", "short"))
    (control / "metrics.jsonl").write_text(
        "".join(json.dumps(line | {"loss_context": 4.875}) + "\n" for line in lines())
    )
    evaluated(control, results(shift=7.0))
    evaluated(run / "untrained", results(shift=20.0))
    text = checked(write_report([run], control).read_text())
    assert "control" in text
    assert "40.7" in text  # the control's perplexity: 31.7 + 2.0 + 7.0
    assert "53.7" in text  # the untrained one's
    assert "control 4.875, this run 4.250" in text
    assert "no control was given" not in text


def test_report_leaves_out_a_control_measured_on_other_inputs(run, tmp_path):
    evaluated(run, results())
    control = tmp_path / "control"
    control.mkdir()
    evaluated(control, results(shift=7.0, seed=5))
    text = checked(write_report([run], control).read_text())
    assert "40.7" not in text
    assert "measured other inputs" in text


def test_metrics_line_cut_by_a_kill_is_dropped_and_a_broken_one_before_it_is_an_error(run):
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(good + '{"step": 31, "lo')
    assert run_files.read_run(run).steps[-1]["step"] == 30
    (run / "metrics.jsonl").write_text('{"step": 0\n' + good)
    with pytest.raises(InputError, match="line 1 is not JSON"):
        run_files.read_run(run)


def test_report_has_a_table_of_data_seen_where_the_run_recorded_it(run):
    assert "Data seen" not in checked(write_report([run]).read_text())
    source = {"prefix": "data/<web>", "samples": 12345, "share": 0.75, "context_tokens": 987654, "prompt_tokens": 321}
    (run / "data_seen.json").write_text(json.dumps({"consumed_samples": 16460, "sources": [source | {"epochs": 1.25}]}))
    text = checked(write_report([run]).read_text())
    for needle in ("Data seen", "data/<web>", "12,345", "75.0%", "987,654", "321", "1.25"):
        assert needle in text


def test_report_tool_prints_the_path_and_refuses_in_one_line(run, tmp_path):
    done = small.run_tool("report", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html")
    small.assert_one_line_error(small.run_tool("report", tmp_path / "none"), "none: no such directory")
    (tmp_path / "empty").mkdir()
    small.assert_one_line_error(small.run_tool("report", tmp_path / "empty"), "expected a RUN")
    evaluated(tmp_path / "empty", {"models": {}})
    small.assert_one_line_error(small.run_tool("report", tmp_path / "empty"), "no models.extended")


def test_perplexity_results_have_the_form_that_the_report_reads():
    import numpy as np

    class Flat:
        def token_losses(self, tokens, position_ids=None, *, last=None):
            losses = np.ones((1, tokens.shape[1] - 1), np.float32)
            return losses[:, -(last or losses.shape[1]) :], losses > 0

    real = perplexity.result(
        responses(Flat(), perplexity.requests_by_length(np.zeros((1, 128), np.int64), [48, 128], scored=16))
    )
    fake = results()["measurements"]["extended"]["perplexity"]
    assert set(real) == set(fake)
    assert set(real["by_length"][0]) == set(fake["by_length"][0])
    assert set(real["by_position"][0]) == set(fake["by_position"][0])
