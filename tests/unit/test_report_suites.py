"""The report and the study iterate over the table of suites: one that a test adds from outside shows in both."""

import json
from dataclasses import replace

import pytest
import yaml
from unit.studying import STUDY, made_up, write_study
from unit.test_report import checked
from unit.toy_suite import TOY

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.registry import SUITES
from endprompt_megatron.report.page import write_report
from endprompt_megatron.study.compare import compare
from endprompt_megatron.study.grid import read_study
from endprompt_megatron.study.pages import as_html, as_markdown


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SUITES, "toy", TOY)


KEY = {"suite": "toy", "task": "echo", "length": 0, "metric": "repeated"}


def score(value, length=0):
    interval = [value - 0.125, value + 0.125]
    return KEY | {"length": length, "samples": 8, "score": value, "interval": interval, "method": "wilson"}


def evaluation(directory, words=4, **more):
    directory.mkdir(parents=True)
    measured = {"baseline": {"toy": {"repeated": 0.25}}, "extended": {"toy": {"repeated": 0.75}}}
    compared = {"samples": 8, "difference": 0.5, "interval": [0.25, 0.75], "p": 0.01, "beyond_noise": True}
    results = {
        "settings": {"suites": ["toy"], "lengths": [], "toy_words": words},
        "models": {label: {"window": 64, "path": f"models/{label}"} for label in measured},
        "measurements": measured,
        "scores": {"baseline": [score(0.25)], "extended": [score(0.75)]},
        "comparisons": [KEY | compared],
    }
    (directory / "results.json").write_text(json.dumps(results | more))
    return directory


def section(page, key):
    start = page.index(f'<section id="{key}">')
    return checked(page[start : page.index("</section>", start)] + "</section>")


def test_a_suite_from_outside_has_its_rows_section_and_differences_in_the_report(toy, tmp_path):
    page = write_report([evaluation(tmp_path / "measured")]).read_text()
    assert '<a href="#toy">Echo</a>' in page
    results, shown = section(page, "results"), section(page, "toy")
    assert "Words repeated 25% 12–38% 75% ▲ 62–88%" in results
    assert "extended minus before: 1 of 1 differences are larger than the noise" in results
    assert "Echo echo +50.0 ▲ +25.0 to +75.0 8" in results
    assert "A word stands three times, and the model goes on." in shown
    assert "a parrot published" in shown
    assert "100.00" in shown
    assert "Words repeated" in page[page.index('<section id="toy">') :].split("<svg", 1)[1].split(">", 1)[0]


def test_a_suite_that_declares_scores_alone_is_shown_by_a_table_of_them(toy, tmp_path, monkeypatch):
    bare = replace(
        TOY,
        headlines=lambda measured, scores: [],
        drawings=lambda results: [],
        published=lambda settings: None,
        by_length=True,
        explanation=lambda measured: "",
        task_names={"echo": "hear & say"},
    )
    monkeypatch.setitem(SUITES, "toy", bare)
    scores = {"extended": [score(0.75, 2048), score(0.5, 8192)]}
    shown = section(write_report([evaluation(tmp_path / "measured", scores=scores)]).read_text(), "toy")
    assert "By task: extended Percent. 2K 8K samples hear & say 75.0 62.5–87.5 50.0 37.5–62.5 8" in shown


def test_results_of_other_inputs_of_a_suite_from_outside_stay_out_of_its_tables(toy, tmp_path):
    places = [evaluation(tmp_path / "four"), evaluation(tmp_path / "five", words=5)]
    shown = section(write_report(places).read_text(), "toy")
    assert "Left out: five measured other inputs than four (toy_words)." in shown


def test_report_names_suites_that_were_not_run_in_its_limits(toy, tmp_path):
    results = {"models": {"extended": {}}, "measurements": {"extended": {}}, "settings": {}}
    page = write_report([evaluation(tmp_path / "measured", **results)]).read_text()
    assert "Echo was not measured ( --suite toy : repeats a word" in section(page, "toy")
    assert "whether the model repeats what it hears" in section(page, "limits")


def test_a_suite_from_outside_can_be_the_evaluation_of_a_study_and_has_its_table(toy, tmp_path):
    keys = yaml.safe_load(STUDY)
    keys["evaluation"] = {"suite": ["toy"], "lengths": [64], "toy_words": 3}
    study = made_up(tmp_path, {"base": [0.0, 1.0], "short-linear-seed1": [1.0, 1.0]}, yaml.safe_dump(keys), KEY)
    comparison = compare(study)
    for page in (as_markdown(comparison), as_html(comparison)):
        assert "Echo, repeated" in page
        assert "Percent, higher is better" in page
    assert "| short-linear | 1 | short |" in as_markdown(comparison)
    assert "| short-linear | **100.0** |" in as_markdown(comparison)
    keys["evaluation"]["toy_wrods"] = 3
    with pytest.raises(InputError, match=r"evaluation.toy_wrods: tools/evaluate.py has no such option"):
        read_study(write_study(tmp_path, yaml.safe_dump(keys)))
