"""Options of tools/evaluate.py that choose a variant of a benchmark reach the questions, and results remember them."""

import html
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import small
from unit import doubles
from unit.asking import ask

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.evaluate_command import settings_of
from endprompt_megatron.evaluate.preparation import Model
from endprompt_megatron.evaluate.registry import SUITES, Settings, Subject
from endprompt_megatron.evaluate.suites import lm_eval, longbench, ruler
from endprompt_megatron.evaluate.suites.longbench import longbench_declaration
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import EXTENDED_TASKS
from endprompt_megatron.evaluate.suites.ruler import ruler_declaration
from endprompt_megatron.evaluate.terminal import terminal
from endprompt_megatron.report.page import write_report
from endprompt_megatron.tokenizer import load_tokenizer

LENGTHS = ["--lengths", "2048", "--out", "out"]


@pytest.fixture
def settings(monkeypatch):
    """Settings of a command line of tools/evaluate.py."""

    def parsed(*arguments: object) -> Settings:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *LENGTHS, "--dtype", "float32", *map(str, arguments)])
        return settings_of(runpy.run_path(str(small.ROOT / "tools" / "evaluate.py"))["command_line"]().parse_args())

    return parsed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small.small_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def questions_of(settings: Settings, model: Path) -> list:
    (name,) = settings.suites
    module, declaration = {"ruler": (ruler, ruler_declaration), "longbench": (longbench, longbench_declaration)}[name]
    tokenizer = load_tokenizer(model)
    subject = Subject(settings, {"extended": Model(model, model)}, "extended", tokenizer, None, 4096)
    return list(module.samples(declaration.settings_for(subject), tokenizer))


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
    assert "RULER's template vicuna-chat" in html.unescape(write_report([tmp_path / "out"]).read_text())


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


@pytest.fixture(scope="module")
def extended_data(tmp_path_factory) -> Path:
    """LongBench-E's layout: each task's records as NAME_e.jsonl, short ones and ones of more than 8,000 words."""
    directory = tmp_path_factory.mktemp("longbench")
    shutil.copytree(small.ROOT / "tests" / "longbench" / "config", directory / "config")
    (directory / "data").mkdir()
    for name in EXTENDED_TASKS:
        records = (small.ROOT / "tests" / "longbench" / "data" / f"{name}.jsonl").read_text().splitlines()
        lines = [json.dumps(json.loads(line) | {"length": 9000 * at}) for at, line in enumerate(records)]
        (directory / "data" / f"{name}_e.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def longbench_e(data: Path) -> list:
    return ["--suite", "longbench", "--longbench-data", data, "--longbench-e"]


def test_longbench_e_asks_its_13_tasks_and_is_reported_by_words(settings, model, extended_data, tmp_path):
    given = settings(*longbench_e(extended_data))
    results = answered(given, model, tmp_path / "out")
    assert results["settings"]["longbench_e"] is True
    assert Settings(**results["settings"]) == given
    scores = {score["task"]: score for score in results["scores"]["extended"]}
    assert scores.keys() == {*EXTENDED_TASKS, "mean_13"}
    assert scores["mean_13"]["samples"] == 26
    measured = results["measurements"]["extended"]["longbench"]
    assert measured["mean_13"]["score"] == pytest.approx(100 * scores["mean_13"]["score"])
    by_words = measured["by_words"]["mean"]
    assert by_words["4-8k"] is None
    said = terminal(results)
    assert "LongBench-E, extended: percent by words of the input" in said
    assert "published\n" not in said
    page = write_report([tmp_path / "out"]).read_text()
    section = page[page.index('<section id="longbench">') :]
    section = section[: section.index("</section>")]
    assert "<h2>LongBench-E</h2>" in section
    assert "LongBench-E: fewer questions than published in 13 of the tasks asked." in page
    assert "mean of 16 tasks" not in section
    for words in ("0-4k", "8k+"):
        assert f"{words} words" in section
        assert f">{by_words[words]:.1f}<" in section
        assert f"{by_words[words]:.2f}" in said
    results_table = page[page.index('<section id="results">') :]
    results_table = results_table[: results_table.index("</section>")]
    assert f"{100 * scores['mean_13']['score']:.1f}*" in results_table


def test_longbench_e_is_of_longbench_alone_and_not_longbench(settings, model, extended_data, tmp_path):
    with pytest.raises(InputError, match="--longbench-e: applies only to the longbench suite, which is not selected"):
        settings("--suite", "needle", "--longbench-e")
    with pytest.raises(InputError, match="LongBench-E: there is no task 'musique'"):
        questions_of(settings(*longbench_e(extended_data), "--longbench-tasks", "musique"), model)
    with pytest.raises(InputError, match="21 of 21 files are missing"):
        questions_of(settings(*longbench_e(extended_data)[:-1]), model)
    for name, more in (("plain", []), ("e", ["--longbench-e"])):
        data = extended_data if more else small.ROOT / "tests" / "longbench"
        given = settings("--suite", "longbench", "--longbench-data", data, "--longbench-tasks", "qasper", *more)
        answered(given, model, tmp_path / name)
    stored = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert stored["settings"].pop("longbench_e") is False  # version 0.1.0 had no word of it
    (tmp_path / "plain" / "results.json").write_text(json.dumps(stored))
    page = write_report([tmp_path / "plain", tmp_path / "e"], out=tmp_path / "page.html").read_text()
    assert "Left out: e measured other inputs than plain (longbench_e)" in page


def test_longbench_prompts_are_read_from_the_given_file(settings, model, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small.ROOT / "tests" / "longbench" / "data", data)
    asked = ["--suite", "longbench", "--longbench-data", data, "--longbench-tasks", "qasper"]
    with pytest.raises(InputError, match=r"no dataset2prompt\.json beside it"):
        questions_of(settings(*asked), model)
    prompts = small.ROOT / "tests" / "longbench" / "config" / "dataset2prompt.json"
    assert questions_of(settings(*asked, "--longbench-prompts", prompts), model)


def test_short_shots_are_numbers_of_examples_by_task(settings):
    assert settings("--suite", "short", "--short-shots", "mmlu=0,gsm8k=8").short_shots == {"mmlu": 0, "gsm8k": 8}
    for wrong in ("mmlu", "mmlu=few", "=5"):
        with pytest.raises(InputError, match=rf"--short-shots {wrong}: should be TASK=NUMBER"):
            settings("--suite", "short", "--short-shots", wrong)


def test_short_shots_and_include_reach_lm_eval_with_the_task_they_are_for(settings, model, monkeypatch):
    calls = []
    monkeypatch.setattr(lm_eval, "left_out", lambda tasks, include: {})
    monkeypatch.setattr(lm_eval, "run", lambda directory, tasks, limit, **more: calls.append((tasks, more)) or {})

    def asked(*more):
        given = settings("--suite", "short", "--short-tasks", "mmlu,own", "--short-include", "tasks", *more)
        subject = Subject(given, {"extended": Model(model, model)}, "extended", load_tokenizer(model), None, 4096)
        return list(SUITES["short"].prepare(subject).requests())

    requests = asked("--short-shots", "own=2")
    for request in requests:
        request.ask(None)
    plain = {"backend": "hf", "dtype": "float32", "chat": False, "include": "tasks"}
    assert calls == [(["mmlu"], plain), (["own"], plain | {"shots": {"own": 2}})]
    keys = [[request.key("model") for request in each] for each in (asked(), requests)]
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]
    with pytest.raises(InputError, match="--short-shots gsm8k: not among the tasks asked, mmlu, own"):
        asked("--short-shots", "gsm8k=2")
