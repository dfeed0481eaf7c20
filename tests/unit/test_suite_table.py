"""The table of suites: a suite from outside the package is asked, stored, shown and refused like the project's own."""

import importlib.util
import json
from dataclasses import replace

import pytest
import small
from unit.asking import ask
from unit.toy_suite import TOY

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate import registry
from endprompt_megatron.evaluate.evaluate_command import settings_of
from endprompt_megatron.evaluate.preparation import Model, prepare
from endprompt_megatron.evaluate.registry import SUITES, Settings, differing_inputs, parse_suites, scores_of, suites_in
from endprompt_megatron.evaluate.terminal import terminal


class Parrot:
    """Repeats the first token of a prompt."""

    def __init__(self):
        self.asked = 0

    def generate(self, prompt_ids, max_new_tokens, ended=None):
        self.asked += 1
        return prompt_ids[:1] if self.asked % 2 else []

    def describe(self):
        return {"engine": "double", "window": 64}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SUITES, "toy", TOY)


def command_line():
    spec = importlib.util.spec_from_file_location("evaluate_tool", small.ROOT / "tools" / "evaluate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.command_line()


def test_a_suite_from_outside_stands_in_the_help_and_its_options_are_read(toy):
    parser = command_line()
    shown = parser.format_help()
    assert "suite toy" in shown
    assert "repeats a word that it was given three times" in shown
    assert "words to ask for (default: 4)" in " ".join(shown.split())
    given = ["--suite", "toy,needle", "--lengths", "32", "--out", "o", "--toy-words", "7"]
    settings = settings_of(parser.parse_args(given))
    assert (settings.suites, settings.toy_words, settings.depths) == (["needle", "toy"], 7, [0.1, 0.5, 0.9])
    with pytest.raises(InputError, match="--toy-words 0: should be at least 1"):
        settings_of(parser.parse_args([*given[:-1], "0"]))


def test_a_suite_from_outside_is_asked_stored_drawn_and_shown(toy, tmp_path, model_dir):
    engine, out = Parrot(), tmp_path / "out"
    results = ask(model_dir, out, engine, suites=["toy"], toy_words=6)
    assert engine.asked == 6
    stored = json.loads((out / "results.json").read_text())
    assert stored["measurements"]["extended"]["toy"] == {"repeated": 0.5}
    assert stored["settings"]["toy_words"] == 6
    assert [score["score"] for score in stored["scores"]["extended"]] == [0.5]
    assert (out / "toy.png").stat().st_size > 1000
    text = terminal(results)
    assert "Echo, extended: percent (95%)" in text
    assert "50.0 (18.8-81.2)" in text
    assert "a parrot" in text
    assert [suite.name for suite in suites_in(stored)] == ["toy"]
    (headline,) = TOY.headlines(stored["measurements"]["extended"]["toy"], scores_of(stored, "extended"))
    assert (headline.label, headline.value, headline.interval) == ("Words repeated", "50%", "19–81%")


def test_a_suite_from_outside_is_left_out_where_its_data_is_missing(toy, tmp_path, model_dir):
    with pytest.raises(InputError, match="--toy-words 27: the alphabet ends at 26"):
        ask(model_dir, tmp_path / "alone", Parrot(), suites=["toy"], toy_words=27)
    settings = Settings(suites=["toy", "needle"], lengths=[240], beyond_window=True, toy_words=27)
    prepared = prepare(settings, {"extended": Model(model_dir, model_dir)})
    assert prepared.left_out == {"toy": "--toy-words 27: the alphabet ends at 26"}
    assert prepared.settings.suites == ["needle"]


def test_results_of_other_inputs_are_told_apart_by_what_a_suite_declares(toy):
    def results(words, **more):
        return {"settings": {"toy_words": words, **more}, "measurements": {"extended": {"toy": {}}}}

    first = (results(4), "extended")
    assert differing_inputs(TOY, first, (results(4, seed=9), "extended")) == []
    assert differing_inputs(TOY, first, (results(5), "extended")) == ["toy_words"]
    reading = replace(TOY, reads_text=lambda settings: True, sources=lambda measured: {"choir": len(measured)})
    other = (results(4) | {"text": {"sha256": "b"}, "measurements": {"extended": {"toy": {"x": 1}}}}, "extended")
    assert differing_inputs(reading, first, other) == ["text", "choir"]


def test_an_engine_that_a_suite_cannot_use_is_refused(toy, monkeypatch):
    monkeypatch.setitem(SUITES, "toy", replace(TOY, refused_engines={"vllm": "parrots fear it"}))
    with pytest.raises(InputError, match="--suite toy: parrots fear it"):
        Settings(suites=["toy"], lengths=[8], engine="vllm").check()
    Settings(suites=["toy"], lengths=[8]).check()


def test_every_suite_declares_what_tables_reports_and_studies_read():
    names = [option.name for suite in SUITES.values() for option in suite.options]
    shared = {name for name in names if names.count(name) > 1}
    assert shared == {"text", "samples", "template", "limit"}
    for suite in SUITES.values():
        assert suite.about
        assert suite.explanation is not None
        assert set(suite.inputs_from) <= set(registry.option_names())
        assert set(suite.requires) <= {option.name for option in suite.options}
        assert suite.means or suite.quoted_tasks
    assert parse_suites("short, needle") == ["needle", "short"]
