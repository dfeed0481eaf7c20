"""Asking, storing and putting together: what was answered is kept, whoever asks it and however that ends."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
import small
from unit import doubles, tiny_suite
from unit.asking import ask, knowing, questions, right, stable

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate import registry, store
from endprompt_megatron.evaluate.evaluation import evaluate
from endprompt_megatron.evaluate.preparation import Model
from endprompt_megatron.evaluate.registry import Settings
from endprompt_megatron.evaluate.requests import Request
from endprompt_megatron.evaluate.split import Part, parse_part
from endprompt_megatron.evaluate.terminal import terminal


@pytest.fixture
def tiny(monkeypatch):
    """The small suite in RULER's place; returns what turns its settings."""
    made = {"settings": tiny_suite.TinySettings()}
    monkeypatch.setitem(
        registry.SUITES,
        "ruler",
        replace(registry.SUITES["ruler"], prepare=lambda s: tiny_suite.prepare(made["settings"], s)),
    )

    def turn(**options):
        made["settings"] = tiny_suite.TinySettings(**options)
        return made["settings"]

    return turn


@pytest.mark.parametrize("kind", [doubles.Knowing, doubles.AllAtOnce])
@pytest.mark.parametrize(("answer", "score"), [(right, 1.0), (lambda _: "", 0.0)], ids=["perfect", "empty"])
def test_a_perfect_model_scores_100_everywhere_and_an_empty_one_0(tmp_path, model_dir, tiny, kind, answer, score):
    engine = knowing(model_dir, tiny(), answer, kind)
    results = ask(model_dir, tmp_path / "out", engine)
    assert engine.asked == 20
    scores = results["scores"]["extended"]
    assert {each["score"] for each in scores} == {score}
    assert {(s["task"], s["length"]): s["samples"] for s in scores} == {
        **{(task, length): 5 for task in ("first", "second") for length in (24, 48)},
        **{("mean", 24): 10, ("mean", 48): 10, ("mean", 0): 20},
    }
    measured = results["measurements"]["extended"]["ruler"]
    assert measured["tasks"]["first"] == {"score": 100 * score, "questions": 10}
    assert measured["sources"] == {"words": "eight colours"}
    shown = terminal(results)
    assert f"{100 * score:.1f} (" in shown
    assert "eight colours" in shown
    assert "76.03" in shown  # the published row
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())


def test_intervals_and_comparison_are_those_of_the_stored_answers(tmp_path, model_dir, tiny):
    """The baseline knows the answers to the even numbers, the extended model all: 3 of 5 against 5 of 5."""
    settings = tiny(samples=40)
    base = small.small_llama(tmp_path / "base", seed=1)
    engines = iter(
        [
            knowing(model_dir, settings, lambda q: right(q) if q.number % 2 == 0 else ""),
            knowing(model_dir, settings, right),
        ]
    )
    models = {"baseline": Model(base, base), "extended": Model(model_dir, model_dir)}
    asked = Settings(suites=["ruler"], lengths=[24, 48], dtype="float32")
    results = evaluate(asked, models, tmp_path / "out", lambda _: next(engines))
    (score,) = [s for s in results["scores"]["baseline"] if (s["task"], s["length"]) == ("second", 24)]
    assert (score["score"], score["method"], score["samples"]) == (0.5, "wilson", 40)
    compared = {(c["task"], c["length"]): c for c in results["comparisons"]}
    assert compared["second", 24]["difference"] == 0.5
    assert compared["second", 24]["p"] == pytest.approx(2 * 0.5**20)
    assert compared["mean", 0]["p"] is None
    assert compared["mean", 0]["beyond_noise"]
    assert "beyond noise" in terminal(results)


def test_an_answer_is_cut_at_the_first_stop(tmp_path, model_dir, tiny):
    settings = tiny(stop=("STOP", "\n"))
    ask(model_dir, tmp_path / "out", knowing(model_dir, settings, lambda q: f"{right(q)}\nred STOP"))
    stored = (tmp_path / "out/answers/extended.0-of-1.jsonl").read_text().splitlines()
    answers = [json.loads(line)["record"]["answer"] for line in stored]
    assert answers == [right(question) for question in questions(settings, model_dir)]


def test_an_evaluation_run_again_asks_nothing_and_with_more_samples_only_the_new_ones(tmp_path, model_dir, tiny):
    engine = knowing(model_dir, tiny(samples=8), right)
    tiny(samples=5)
    first = ask(model_dir, tmp_path / "out", engine)
    assert engine.asked == 20
    assert stable(ask(model_dir, tmp_path / "out", None)) == stable(first)  # no engine is opened
    tiny(samples=8)
    more = ask(model_dir, tmp_path / "out", engine, ruler_samples=8)
    assert engine.asked == 32
    assert more["scores"]["extended"][0]["samples"] == 8


def test_a_changed_prompt_is_asked_again_and_a_changed_model_refused(tmp_path, model_dir, tiny, monkeypatch):
    engine = knowing(model_dir, tiny(), right)
    ask(model_dir, tmp_path / "out", engine)
    monkeypatch.setattr(tiny_suite, "WORDS", ["gold", *tiny_suite.WORDS[1:]])
    shutil.rmtree(tmp_path / "out" / "asked")  # another version of the suite would make another job of it
    changed = knowing(model_dir, tiny(), right)
    results = ask(model_dir, tmp_path / "out", changed)
    assert 0 < changed.asked < 20  # where the word was drawn
    assert results["scores"]["extended"][0]["score"] == 1.0
    other = small.small_llama(tmp_path / "other", seed=2)
    with pytest.raises(InputError, match="holds answers of another extended model, or of this one before its weights"):
        ask(other, tmp_path / "out", None)
    with pytest.raises(InputError, match="given with --dtype float32, this is --dtype bfloat16; choose another --out"):
        ask(model_dir, tmp_path / "out", None, dtype="bfloat16")
    with pytest.raises(InputError, match="given with --engine transformers, this is --engine megatron"):
        ask(model_dir, tmp_path / "out", None, engine="megatron")


@pytest.mark.parametrize("keep", [1, 60, -1, -2], ids=["one byte", "sixty bytes", "no newline", "one byte less"])
def test_a_request_whose_stored_line_a_kill_cut_is_asked_again(tmp_path, model_dir, tiny, keep):
    first = ask(model_dir, tmp_path / "out", knowing(model_dir, tiny(), right))
    path = tmp_path / "out/answers/extended.0-of-1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:keep])
    shutil.rmtree(tmp_path / "out" / "asked")
    (tmp_path / "out" / "results.json").unlink()
    engine = knowing(model_dir, tiny(), right)
    assert stable(ask(model_dir, tmp_path / "out", engine)) == stable(first)
    assert engine.asked == 13
    for line in path.read_bytes().splitlines():
        json.loads(line)


def test_parts_of_an_evaluation_in_any_order_give_the_table_of_one_process(tmp_path, model_dir, tiny):
    settings = tiny()
    whole = ask(model_dir, tmp_path / "whole", knowing(model_dir, settings, right))
    engines = []
    with pytest.raises(InputError, match=r"--merge: .*: nothing was asked of the extended model"):
        ask(model_dir, tmp_path / "out", None, merge=True)
    for index in (2, 0, 1):
        engines.append(knowing(model_dir, settings, right))
        results = ask(model_dir, tmp_path / "out", engines[-1], part=Part(index, 3))
        if index != 1:
            assert results is None
            assert not (tmp_path / "out" / "results.json").exists()
            with pytest.raises(InputError, match=r"of 3 parts of extended are not complete; run --part \d/3"):
                ask(model_dir, tmp_path / "out", None, merge=True)
    assert sorted(engine.asked for engine in engines) == [6, 7, 7]
    assert stable(results) == stable(whole)
    assert stable(ask(model_dir, tmp_path / "out", None, merge=True)) == stable(whole)
    # Split in another way, nothing is asked again.
    assert ask(model_dir, tmp_path / "out", None, part=Part(0, 2)) is not None


def test_two_processes_cannot_answer_the_same_part_of_an_evaluation(tmp_path, model_dir, tiny):
    ask(model_dir, tmp_path / "out", knowing(model_dir, tiny(), right))
    first, second = (store.Answers(tmp_path / "out", "extended", Part()) for _ in range(2))
    request = Request("ruler", "first", 24, 0, b"", 0)
    first.add("a", request, {}, 1.0)
    with pytest.raises(InputError, match="another process does part 0-of-1"):
        second.add("b", request, {}, 1.0)
    first.close()
    second.add("b", request, {}, 1.0)
    second.close()


def test_parts_that_begin_at_once_do_not_refuse_each_others_directory(tmp_path):
    identity = {"engine": "transformers", "dtype": "float32", "models": {"extended": "a"}}
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)

    def begin():
        for number in range(400):
            ready.wait(60)
            store.open_state(tmp_path / str(number), identity, write=True)

    other = context.Process(target=begin)
    other.start()
    for number in range(400):
        out = tmp_path / str(number)
        ready.wait(60)
        while not (out / "asked").exists():
            store.refuse_foreign(out)
        store.open_state(out, identity, write=True)
    other.join(60)
    assert other.exitcode == 0
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "thesis.tex").touch()
    with pytest.raises(InputError, match="already exists and holds no evaluation"):
        store.open_state(tmp_path / "alien", identity, write=True)


def test_an_input_beyond_the_window_is_refused_without_beyond_window(tmp_path, model_dir, tiny):
    settings = tiny(lengths=(24, 80))
    with pytest.raises(InputError, match=r"--lengths 80: above the window of 64 of .*--beyond-window"):
        ask(model_dir, tmp_path / "out", None, lengths=[24, 80])
    # A suite whose prompts are longer than its lengths say.
    with pytest.raises(InputError, match="--suite ruler: first takes 80 tokens, above the model's window of 64"):
        ask(model_dir, tmp_path / "out", knowing(model_dir, settings, right))
    results = ask(model_dir, tmp_path / "more", knowing(model_dir, settings, right), beyond_window=True)
    assert results["scores"]["extended"][-1]["score"] == 1.0


def test_part_is_read_from_the_command_line_or_the_slurm_array():
    assert parse_part(None) == Part(0, 1)
    assert parse_part("2/4") == Part(2, 4)
    numbers = {"ID": "7", "MIN": "5", "MAX": "8", "COUNT": "4"}
    array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in numbers.items()}
    assert parse_part("array", array) == Part(2, 4)
    assert Part(1, 2).split(2, 3) == Part(5, 6)
    for text, environment, message in (
        ("4/4", {}, "should be I/N with I from 0 to N-1"),
        ("half", {}, "should be I/N"),
        ("array", {}, "SLURM_ARRAY_TASK_ID is not set"),
        ("array", array | {"SLURM_ARRAY_TASK_MAX": "11"}, "not numbered one by one; use --array=0-3"),
    ):
        with pytest.raises(InputError, match=message):
            parse_part(text, environment)
    assert sorted(place for index in range(3) for place in range(10) if Part(index, 3).has(place)) == list(range(10))


NATIVE = {
    "suites": ["perplexity", "needle", "virtual"],
    "lengths": [200, 220],
    "scored": 64,
    "stride": 30,
    "samples": 8,
    "physical": 32,
    "probe_samples": 2,
    "beyond_window": True,
    "dtype": "float32",
}


def kill_after(path, answers, seconds):
    """Kill this process so long after the file has so many answers."""
    while not path.exists() or path.read_bytes().count(b"\n") < answers:
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def evaluate_here(model_dir, out, text, *killed):
    """In a process of its own, which may be killed: by a thread, which has its turns however busy the machine is."""
    import torch

    from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine

    torch.set_num_threads(1)
    if killed:
        threading.Thread(target=kill_after, args=killed, daemon=True).start()

    def engine(model):
        return TransformersEngine(model.weights, "cpu", dtype="float32")

    evaluate(Settings(**NATIVE, text=str(text)), {"extended": Model(model_dir, model_dir)}, out, engine)


def test_an_evaluation_killed_at_any_moment_and_run_again_gives_the_same_table(tmp_path, model_dir, draws, few_or_many):
    book = tmp_path / "book.txt"
    book.write_text(small.text(1500))
    evaluate_here(model_dir, tmp_path / "whole", book)
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    total = len((tmp_path / "whole/answers/extended.0-of-1.jsonl").read_text().splitlines())
    assert total > 60

    path = tmp_path / "out/answers/extended.0-of-1.jsonl"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unit.test_ask", "endprompt_megatron.evaluate.engines.transformers_engine"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (small.ROOT / "tests", small.ROOT, before))))
    kills, seen, (least, most) = 0, 0, few_or_many((total // 5, 2 * total // 5), (5, total // 3))
    try:
        while not (tmp_path / "out" / "results.json").exists():
            killed = path, seen + draws.randrange(least, most), draws.random() * 0.03
            process = context.Process(target=evaluate_here, args=(model_dir, tmp_path / "out", book, *killed))
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            kills += process.exitcode != 0
            lines = path.read_bytes().count(b"\n")
            assert lines > seen or lines == total  # every start gets further
            seen = lines
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    assert kills >= 2
    keys = [json.loads(line)["key"] for line in path.read_bytes().splitlines()]
    assert len(keys) == len(set(keys)) == total  # nothing was asked twice
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stable(found) == stable(whole)


def test_a_suite_without_its_data_is_left_out_if_others_are_asked(tmp_path, model_dir, tiny):
    model = knowing(model_dir, tiny(samples=2), right)
    scores = ask(model_dir, tmp_path / "without", model)["scores"]
    results = ask(model_dir, tmp_path / "out", model, suites=["ruler", "longbench"])
    assert results["scores"] == scores
    assert list(results["left_out"]) == ["longbench"]
    assert results["settings"]["suites"] == ["ruler"]
    assert "Left out: longbench. --longbench-data: missing; --suite longbench needs" in terminal(results)
    with pytest.raises(InputError, match="--longbench-data: missing"):
        ask(model_dir, tmp_path / "alone", model, suites=["longbench"])
    assert not (tmp_path / "alone").exists()
