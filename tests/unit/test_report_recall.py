"""Recall in the report: facts by length and distance, with their intervals, and never dropped."""

import json
import re

import pytest
from small import run_tool
from unit import reports
from unit.test_report import checked

from endprompt_megatron.report.page import write_report

DISTANCES = [128, 1024]


@pytest.fixture(scope="module")
def recalled(tmp_path_factory):
    """An evaluation by recall alone."""
    root = tmp_path_factory.mktemp("recalled")
    made = reports.sources(root / "made")
    reports.evaluated(made, root / "evaluation", suites=("recall",), recall_distances=DISTANCES)
    return root / "evaluation"


def section(page: str, key: str) -> str:
    start = page.index(f'<section id="{key}">')
    return checked(page[start : page.index("</section>", start)] + "</section>")


def test_a_report_of_recall_alone_has_its_scores_in_the_results(recalled, tmp_path):
    done = run_tool("report", recalled, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    stored = json.loads((recalled / "results.json").read_text())
    results, recall = section(page, "results"), section(page, "recall")
    for label in ("baseline", "extended"):
        cells = stored["measurements"][label]["recall"]["cells"]
        assert {(cell["length"], cell["distance"]) for cell in cells} == {
            (length, distance) for length in reports.LENGTHS for distance in DISTANCES
        }
        for length in reports.LENGTHS:
            at = [cell for cell in cells if cell["length"] == length]
            found = sum(round(cell["recalled"] * cell["samples"]) for cell in at)
            assert f"{found} of {sum(cell['samples'] for cell in at)}" in results
            for cell in at:
                assert f"{100 * cell['recalled']:.1f}" in recall
                assert f"{cell['loss']:.3f}" in recall
    for length in reports.LENGTHS:
        assert f"Facts recalled, {length:,} tokens" in results
        assert f"Recall, {length:,} tokens, recalled" in results  # what differs from before, question by question
        for distance in DISTANCES:
            assert f"{distance:,} tokens away" in recall
    assert '<a href="#recall">' in page


def test_recall_of_another_text_or_form_is_left_out_and_said(recalled, tmp_path):
    for name, changes in (("text", {"text": {"sha256": "other"}}), ("form", {"settings": {"recall_form": "x.json"}})):
        stored = json.loads((recalled / "results.json").read_text())
        for key, change in changes.items():
            stored[key] |= change
        other = tmp_path / name
        other.mkdir()
        (other / "results.json").write_text(json.dumps(stored))
        page = write_report([recalled, other], out=tmp_path / f"{name}.html").read_text()
        assert re.search(r"Left out: [^.]*measured other inputs than", section(page, "recall")), name


def test_report_without_recall_says_so(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps({"models": {"extended": {}}, "measurements": {"extended": {}}, "settings": {}})
    )
    text = section(write_report([tmp_path]).read_text(), "recall")
    assert "Recall was not measured" in text
