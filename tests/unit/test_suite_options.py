"""Options of tools/evaluate.py that choose a variant of a benchmark reach the questions, and results remember them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import small
from unit import doubles
from unit.asking import ask

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate import registry
from endprompt_megatron.evaluate.evaluate_command import settings_of
from endprompt_megatron.evaluate.settings import Settings
from endprompt_megatron.evaluate.tables import terminal
from endprompt_megatron.report.page import write_report
from endprompt_megatron.tokenizer import load_tokenizer

LENGTHS = ["--lengths", "2048", "--out", "out"]


@pytest.fixture
def settings(monkeypatch):
    """Settings of a command line of tools/evaluate.py."""

    def parsed(*arguments: object) -> Settings:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *LENGTHS, "--dtype", "float32", *map(str, arguments)])
        return settings_of(runpy.run_path(str(small.ROOT / "tools" / "evaluate.py"))["arguments"]())

    return parsed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small.small_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def questions_of(settings: Settings, model: Path) -> list:
    (name,) = settings.suites
    suite = registry.QuestionSuite(name, settings, model, 4096, load_tokenizer(model))
    return list(suite.module.questions(suite.settings, suite.tokenizer))


def answered(settings: Settings, model: Path, out: Path) -> dict:
    """Results of a model that knows every answer."""
    engine = doubles.Knowing(questions_of(settings, model), load_tokenizer(model), lambda q: ", ".join(q.references))
    return ask(model, out, engine, **settings.as_dict())


RULER = ("--suite", "ruler", "--ruler-tasks", "niah_single_1", "--ruler-samples", 2)


def test_ruler_template_asks_in_that_template_and_results_and_report_name_it(settings, model, tmp_path):
    given = settings(*RULER, "--ruler-template", "vicuna-chat")
    prompts = [load_tokenizer(model).decode(question.prompt) for question in questions_of(given, model)]
    assert len(prompts) == 2
    for prompt in prompts:
        assert "detailed, and polite answer" in prompt
        assert " ASSISTANT: The special magic number for" in prompt
    results = answered(given, model, tmp_path / "out")
    assert results["settings"]["ruler_template"] == "vicuna-chat"
    assert results["measurements"]["extended"]["ruler"]["sources"]["template"] == "vicuna-chat"
    assert Settings(**results["settings"]) == given
    assert "template: vicuna-chat" in terminal(results)
    assert "RULER's template vicuna-chat" in write_report([tmp_path / "out"]).read_text()


def test_ruler_template_is_of_ruler_alone_and_template_holds_without_it(settings, model):
    plain = questions_of(settings(*RULER), model)
    assert settings(*RULER).ruler_template is None
    assert [q.prompt for q in questions_of(settings(*RULER, "--ruler-template", "base"), model)] == [
        q.prompt for q in plain
    ]
    with pytest.raises(InputError, match=r"--ruler-template Phi3: applies only to the ruler suite, .* not selected"):
        settings("--suite", "needle", "--ruler-template", "Phi3")
    with pytest.raises(InputError, match=r"--ruler-template phi: unknown; use chat .*, or base, meta-chat"):
        questions_of(settings(*RULER, "--ruler-template", "phi"), model)


def test_results_in_another_ruler_template_do_not_stand_in_one_table(settings, model, tmp_path):
    for name, more in (("one", ()), ("other", ("--ruler-template", "Phi3"))):
        answered(settings(*RULER, *more), model, tmp_path / name)
    stored = json.loads((tmp_path / "one" / "results.json").read_text())
    del stored["settings"]["ruler_template"]  # as version 0.1.0 wrote it
    (tmp_path / "one" / "results.json").write_text(json.dumps(stored))
    page = write_report([tmp_path / "one", tmp_path / "other"], out=tmp_path / "page.html").read_text()
    assert "Left out: other measured other inputs than one (ruler_template, sources)" in page
