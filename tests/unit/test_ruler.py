"""RULER's questions are NVIDIA's to the letter, its scores NVIDIA's, and a summary says what it is not comparable to.

ruler_golden.json holds checksums of samples that NVIDIA's unmodified scripts (NVIDIA/RULER c3f5e3b) made of the files
of tests/ruler_files.py, and the scores that its own functions gave to made-up answers.  Written by

    python tests/ruler_files.py F
    GIVEN="--haystack F/essays.json --squad F/squad.json --hotpotqa F/hotpotqa.json
        --english-words F/english_words.json --punkt F/punkt --tokenizer F/tokenizer"
    NVIDIA="python benchmarks/ruler_generation.py --nvidia RULER --python VENV/bin/python"
    $NVIDIA $GIVEN --golden tests/unit/ruler_golden.json --lengths 3072,8192 --samples 5
    $NVIDIA $GIVEN --golden tests/unit/ruler_golden.json --lengths 8192 --samples 3 --template vicuna-chat \\
        --tasks niah_single_1,niah_multiquery,vt,cwe,fwe,qa_1
"""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from small import ROOT

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.benchmark import Sample
from endprompt_megatron.evaluate.suites.ruler import TASKS, check, samples, score, summary
from endprompt_megatron.evaluate.suites.ruler.ruler_suite import prompts
from endprompt_megatron.evaluate.suites.ruler.templates import template
from endprompt_megatron.tokenizer import load_tokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))
from ruler_generation import checksum, our_score

GOLDEN = json.loads((Path(__file__).parent / "ruler_golden.json").read_text())


def one_line(error: pytest.ExceptionInfo, *needles: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


# NVIDIA's samples and scores


def test_ruler_golden_samples_cover_every_task():
    assert {key.split("/")[1] for key in GOLDEN if key.startswith("base/")} == set(TASKS)


@pytest.mark.parametrize("key", GOLDEN)
def test_ruler_samples_and_scores_equal_nvidias(key, asking, pieces):
    form, task, length = key.split("/")
    given = asking(lengths=(int(length),), samples=len(GOLDEN[key]["samples"]), template=form)
    rows = []
    for sample in prompts(given, pieces, template(form), task, int(length)):
        at = sample.text.rfind(TASKS[task].answer_prefix[:10])
        row = {"input": sample.text[:at], "outputs": sample.references, "answer_prefix": sample.text[at:]}
        rows.append({**row, "length": len(sample.ids) + TASKS[task].new_tokens})
    assert [checksum(row) for row in rows] == GOLDEN[key]["samples"]
    assert our_score(task, rows) == GOLDEN[key]["score"]


# Questions


def test_ruler_samples_hold_the_prompt_and_what_an_engine_needs(asking, pieces):
    given = asking(lengths=(6000, 8192))
    found = list(samples(given, pieces))
    expected = list(itertools.product((6000, 8192), TASKS, range(2)))
    assert [(q.length, q.task, q.number) for q in found] == expected
    assert check(given) == dict.fromkeys(TASKS, 4)
    made_of = {place[:2]: prompts(given, pieces, template("base"), place[1], place[0]) for place in expected}
    for question in found:
        made = next(made_of[question.length, question.task])
        assert pieces.decode(question.prompt) == made.text
        assert question.references == made.references
        assert question.max_new_tokens == TASKS[question.task].new_tokens
        assert len(question.prompt) + question.max_new_tokens <= question.length
        assert made.text.endswith(question.extra["answer_prefix"])
        assert question.suite == "ruler"
        assert json.loads(json.dumps(question.extra)) == question.extra
        text = made.text.lower()
        if TASKS[question.task].kind != "qa":  # whose made-up answers may stand nowhere
            assert all(reference.lower() in text for reference in question.references)


def test_ruler_inputs_fill_their_length(asking, pieces):
    """But for what retries take off: 500 words of essays, 25 needles, 10 documents, a 32nd of the coded words."""
    for question in samples(asking(samples=1), pieces):
        assert 8192 - len(question.prompt) - question.max_new_tokens < 2100, question.task


def test_the_first_samples_do_not_depend_on_how_many_are_asked_and_none_is_made_before_its_turn(asking, pieces):
    few = [q for q in samples(asking(tasks=("fwe", "vt"), samples=2), pieces) if q.task == "vt"]
    many = samples(asking(tasks=("vt",), samples=10**9), pieces)
    assert list(itertools.islice(many, 2)) == few


def test_another_ruler_seed_asks_other_questions_and_says_so(asking, pieces):
    [first], [second] = (
        list(samples(asking(tasks=("niah_single_1",), samples=1, seed=seed), pieces)) for seed in (42, 43)
    )
    assert first.prompt != second.prompt
    assert first.extra["deviations"] == []
    assert second.extra["deviations"] == ["seed 43 instead of 42"]


def test_bos_stands_once_before_a_ruler_prompt_and_is_not_counted(asking, pieces, ruler, tmp_path):
    with_bos = _with_bos(ruler, tmp_path)
    assert with_bos.starts_with_bos
    given = asking(tasks=("niah_single_1", "cwe"))
    for plain, question in zip(samples(given, pieces), samples(given, with_bos), strict=True):
        assert question.prompt == [with_bos.bos_id, *plain.prompt]


def _with_bos(ruler: Path, directory: Path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_file(str(ruler / "tokenizer" / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text((ruler / "tokenizer" / "tokenizer_config.json").read_text())
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    ("given", "unexpected"),
    [(["niah_single_1"], "Some special"), (["niah_multiquery", "niah_multivalue"], "A special")],
)
def test_ruler_asks_for_one_answer_in_the_singular(given, unexpected, asking, pieces):
    for question in samples(asking(tasks=tuple(given)), pieces):
        assert unexpected not in pieces.decode(question.prompt)


# Templates


def test_the_models_own_chat_template_stands_around_the_task_and_keeps_its_words(asking, pieces, ruler, tmp_path):
    config = json.loads((ruler / "tokenizer" / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}You are {x}. USER: {{ m.content }} END{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text((ruler / "tokenizer" / "tokenizer.json").read_text())
    given = asking(tasks=("niah_single_1",), template="chat", model=tmp_path)
    for question in samples(given, pieces):
        text = pieces.decode(question.prompt)
        assert text.startswith("<|begin|>You are {x}. USER: A special magic number is hidden")
        assert re.search(r"provided text\? END ASSISTANT: The special magic number for \S+ mentioned in the", text)
        assert question.prompt[0] == pieces.bos_id
        assert question.prompt.count(pieces.bos_id) == 1
        assert len(question.prompt) + 128 <= 8192


@pytest.mark.parametrize(
    ("name", "model", "needles"),
    [
        ("llama", None, ("--ruler-template llama", "meta-llama3")),
        ("chat", None, ("--template chat", "directory")),
        ("chat", "tokenizer", ("no chat template", "base")),
        ("chat", "nothing", ("--template chat", "nothing")),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(name, model, needles, ruler):
    with pytest.raises(InputError) as error:
        template(name, model and ruler / model)
    one_line(error, *needles)


# Scores


def perfect(question: Sample) -> str:
    return "They are: " + ", ".join(question.references)


def test_perfect_answers_score_100_on_every_task_and_empty_ones_0(asking, pieces):
    asked = list(samples(asking(), pieces))
    for say, percent in ((perfect, 100.0), (lambda _: "", 0.0)):
        table = summary([(question, say(question), score(question, say(question))) for question in asked])
        assert table["scores"] == {task: {"8192": percent} for task in TASKS}
        assert table["mean"] == table["by_length"]["8192"]["mean"] == percent


@pytest.mark.parametrize(
    ("task", "references", "said", "expected"),
    [
        ("niah_multivalue", ["123", "456", "789", "1234"], "456 and 12345", 3 / 4),
        ("niah_single_3", ["ab-CD"], "It is AB-cd.", 1.0),
        ("vt", ["ABC", "DEF"], "abc", 0.5),
        ("qa_1", ["Paris", "the city of Paris"], "paris, I think", 1.0),
        ("qa_2", ["yes"], "no", 0.0),
        ("cwe", ["ad hoc"], "ad\thoc", 0.0),
        ("cwe", ["ad\nhoc"], "\x00 ad\thoc \x1f", 1.0),
    ],
)
def test_a_ruler_reference_counts_if_the_answer_contains_it(task, references, said, expected):
    assert score(Sample("ruler", task, 0, 0, [], 1, references), said) == expected


def _scored(tasks, lengths, count, value=1.0, **extra):
    for task, length, number in itertools.product(tasks, lengths, range(count)):
        yield Sample("ruler", task, length, number, [], 1, ["x"], extra=extra), "x", value


def test_a_complete_ruler_run_is_comparable_to_published_scores():
    table = summary(_scored(TASKS, (4096, 8192), 500, 0.5, haystack="H", deviations=[]))
    assert table["comparable"]
    assert table["notes"] == []
    assert table["mean"] == 50.0
    assert table["questions"] == 13 * 2 * 500
    assert table["haystack"] == "H"
    assert table["by_length"]["4096"] == {"mean": 50.0, "tasks": 13, "samples": 6500}


def test_ruler_averages_tasks_by_length_and_then_lengths():
    scored = [*_scored(["vt"], [4096], 3, 1.0), *_scored(["cwe"], [4096], 1, 0.0), *_scored(["vt"], [8192], 2, 1 / 3)]
    table = summary(scored)
    assert table["scores"] == {"vt": {"4096": 100.0, "8192": 33.33}, "cwe": {"4096": 0.0}}
    assert table["samples"] == {"vt": {"4096": 3, "8192": 2}, "cwe": {"4096": 1}}
    assert [table["by_length"][length]["mean"] for length in ("4096", "8192")] == [50.0, 33.33]
    assert table["mean"] == pytest.approx((50 + 33.33) / 2)


@pytest.mark.parametrize(
    ("tasks", "count", "extra", "needle"),
    [
        ([task for task in TASKS if not task.startswith("qa")], 500, {}, "11 of 13 tasks, without qa_1, qa_2"),
        (TASKS, 20, {}, "20 samples a task and length instead of 500"),
        (TASKS, 500, {"deviations": ["haystack: another"]}, "haystack: another"),
    ],
)
def test_a_ruler_run_that_differs_from_the_published_one_says_so(tasks, count, extra, needle):
    table = summary(_scored(tasks, (4096,), count, **extra))
    assert not table["comparable"]
    assert table["notes"] == [f"not comparable to published RULER: {needle}"]


def test_a_ruler_summary_of_no_scores_is_empty():
    assert summary([])["mean"] is None
