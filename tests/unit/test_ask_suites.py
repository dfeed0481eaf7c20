"""Suites asked from end to end: doubles on RULER's and LongBench's own questions, sliding perplexity, short text."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import small
from unit import doubles
from unit.asking import ask

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.preparation import Model
from endprompt_megatron.evaluate.registry import Settings, Subject
from endprompt_megatron.evaluate.suites import lm_eval, longbench, ruler
from endprompt_megatron.evaluate.suites.longbench import longbench_declaration
from endprompt_megatron.evaluate.suites.ruler import ruler_declaration
from endprompt_megatron.evaluate.terminal import terminal
from endprompt_megatron.tokenizer import load_tokenizer

OFFLINE = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]  # RULER's that need no essays


def subject(model_dir, tokenizer, options):
    """One model that an evaluation with these options asks."""
    models = {"extended": Model(model_dir, model_dir)}
    return Subject(Settings(**options), models, "extended", tokenizer, None, models["extended"].window)


def test_ruler_scores_perfect_answers_100_and_empty_ones_0(tmp_path):
    model = small.small_llama(tmp_path / "model", max_position_embeddings=8192, vocab_size=2000, tokenizer=False)
    # Its worked examples are made for tokenizers that know words.
    texts = [path.read_text() for path in Path(ruler.__file__).parent.glob("*.py")]
    small.small_tokenizer(model, vocab_size=2000, texts=texts)
    options = {"lengths": [4096, 8192], "ruler_samples": 2, "ruler_tasks": OFFLINE, "suites": ["ruler"]}
    tokenizer = load_tokenizer(model)
    asked = list(ruler.samples(ruler_declaration.settings_for(subject(model, tokenizer, options)), tokenizer))
    for answer, score in ((lambda question: ", ".join(question.references), 1.0), (lambda _: "", 0.0)):
        engine = doubles.Knowing(asked, tokenizer, answer)
        results = ask(model, tmp_path / str(score), engine, **options)
        assert {each["score"] for each in results["scores"]["extended"]} == {score}
        assert {each["task"] for each in results["scores"]["extended"]} == {*OFFLINE, "mean"}
        assert results["measurements"]["extended"]["ruler"]["mean"] == 100 * score
        assert "RULER, extended" in terminal(results)


def test_longbench_scores_perfect_answers_100_and_empty_ones_0(tmp_path):
    data = Path(__file__).resolve().parent.parent / "longbench"
    model = small.small_llama(tmp_path / "model", max_position_embeddings=4096)
    options = {"lengths": [64], "longbench_data": str(data), "suites": ["longbench"], "dtype": "float32"}
    tokenizer = load_tokenizer(model)
    settings = longbench_declaration.settings_for(subject(model, tokenizer, options))
    asked = list(longbench.samples(settings, tokenizer))
    for answer, score in ((lambda question: question.references[0], 1.0), (lambda _: "", 0.0)):
        results = ask(model, tmp_path / str(score), doubles.Knowing(asked, tokenizer, answer), **options)
        scores = {each["task"]: each for each in results["scores"]["extended"]}
        # The benchmark's ROUGE adds 1e-8 to its denominator, and so never quite reaches 1.
        assert [each["score"] for each in scores.values()] == pytest.approx([score] * len(scores), abs=1e-8)
        assert len(scores) == 21 + 6 + 2  # tasks, groups, means
        assert scores["mean_21"]["samples"] == len(asked)
        assert results["measurements"]["extended"]["longbench"]["mean_16"]["score"] == pytest.approx(
            100 * score, abs=1e-6
        )
        assert "LongBench, published" in terminal(results)


def test_sliding_perplexity_scores_every_token_once_from_a_window_that_moves(tmp_path, model_dir):
    from unit.test_engine import natural, reference_losses

    from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine
    from endprompt_megatron.evaluate.requests import responses
    from endprompt_megatron.evaluate.suites import perplexity

    engine = TransformersEngine(model_dir, "cpu", dtype="float32")
    rows = np.random.default_rng(0).integers(3, 300, (2, 150))
    slid = responses(engine, perplexity.sliding_requests(rows, 64, 20))
    expected = []
    for row in rows:
        done = 1
        for end in (64, 84, 104, 124, 144, 150):
            window = row[None, end - 64 : end]
            losses, _ = reference_losses(engine.model, window, natural(window))
            expected += losses[0, -(end - done) :].tolist()
            done = end
    assert len(expected) == 2 * 149
    whole = responses(engine, perplexity.requests_by_length(rows, [100, 150], scored=32))
    found = perplexity.result([*whole, *slid])["sliding"]
    assert (found["window"], found["stride"], found["tokens"]) == (64, 20, 298)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert "sliding" not in perplexity.result(whole)
    # A window as long as the text is the text read whole.
    read = perplexity.result([*whole, *responses(engine, perplexity.sliding_requests(rows, 4096, 20))])["sliding"]
    assert read["window"] == 150
    assert read["loss"] == pytest.approx(np.mean([reference_losses(engine.model, rows, natural(rows))[0]]), rel=1e-5)


def test_lm_eval_tasks_are_asked_one_by_one_without_an_engine(tmp_path, model_dir, monkeypatch):
    measured = []

    def run(directory, tasks, limit, *, backend, dtype, chat):
        (task,) = tasks
        measured.append((directory, task, limit))
        if task == "gsm8k" and len(measured) == 2:
            raise KeyboardInterrupt
        row = {"score": 50.0, "stderr": 25.0, "metric": "acc,none", "shots": 5, "questions": 4}
        return {"tasks": {task: row | ({} if task == "mmlu" else {"score": 25.5})}, "lm_eval": "1.2.3"}

    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(InputError, match="short text: needs lm-eval, which is not installed"):
            ask(model_dir, tmp_path / "out", None, suites=["short"])
    monkeypatch.setattr(lm_eval, "TASKS", {"mmlu": None, "gsm8k": None, "humaneval": None})
    monkeypatch.setattr(lm_eval, "run", run)
    monkeypatch.setattr(
        lm_eval, "left_out", lambda tasks, include: {task: "may not run here" for task in tasks if task == "humaneval"}
    )
    with pytest.raises(InputError, match="--short-tasks humaneval: may not run here, or leave the task out"):
        ask(model_dir, tmp_path / "out", None, suites=["short"], short_tasks=["mmlu", "humaneval"])
    with pytest.raises(KeyboardInterrupt):
        ask(model_dir, tmp_path / "out", None, suites=["short"], limit=4)
    results = ask(model_dir, tmp_path / "out", None, suites=["short"], limit=4)
    assert [task for _, task, _ in measured] == ["mmlu", "gsm8k", "gsm8k"]
    scores = {score["task"]: score for score in results["scores"]["extended"]}
    assert (scores["mmlu"]["score"], scores["mmlu"]["samples"]) == (0.5, 4)
    assert scores["gsm8k"]["interval"] is None
    assert scores["mean"]["score"] == pytest.approx(0.3775)
    assert results["measurements"]["extended"]["short"]["mean"]["score"] == pytest.approx(37.75)
    assert (scores["mmlu"]["method"], scores["gsm8k"]["score"]) == ("wilson", 0.255)
    assert results["models"]["extended"]["window"] == 64
    assert "52.41" in terminal(results)
    assert results["left_out"] == {"short humaneval": "may not run here"}
    assert "Left out: short humaneval. may not run here" in terminal(results)
