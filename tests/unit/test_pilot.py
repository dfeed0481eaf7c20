"""The pilot: what it tries, what it recommends, and that it runs and goes on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import ROOT, assert_one_line_error
from unit.studying import Study

from endprompt_megatron.config.resolve import load_resolved
from endprompt_megatron.evaluate.suites.recall_inputs import Form, build_together
from endprompt_megatron.study.grid import read_study
from endprompt_megatron.study.pilot import (
    Asked,
    Row,
    as_text,
    best_scaling,
    distances_for,
    lengths_for,
    recommend,
    study_of,
)
from endprompt_megatron.tokenizer import load_tokenizer

WINDOW = 64
FORM = {
    **{"fact": " it {key} {value}", "question": " it {key}", "key_words": 1, "value_words": 2},
    **{"keys": "who their would which more when what said".split(), "values": ["up", "one"]},
}


def row(name: str, inside: float, outside: float, recalled: float, trained: bool = False) -> Row:
    return Row(name, trained, {32: inside, 64: inside, 128: outside}, {32: 1.0, 64: 1.0, 128: recalled})


BASE = row("base", 3.0, 5.0, 0.0)


def pilot(place: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "pilot.py"), "recipe.yaml", "--text", "train", "--out", "pilot"]
    return subprocess.run([*command, *arguments], cwd=place, capture_output=True, text=True)


def test_lengths_of_a_pilot_go_from_inside_the_window_to_the_target():
    assert lengths_for(8192, 16384) == (4096, 8192, 12288, 16384)
    assert lengths_for(8192, 65536) == (4096, 8192, 12288, 65536)
    assert lengths_for(8192, 10000) == (4096, 8192, 10000)


@pytest.mark.parametrize(("window", "target"), [(512, 1024), (512, 4096), (480, 700)])
def test_distances_of_a_pilot_fit_side_by_side_at_every_length(model_dir, window, target):
    tokenizer, lengths = load_tokenizer(model_dir), lengths_for(window, target)
    text = np.asarray(tokenizer.encode("the of and to in is was for with up " * target), dtype=np.int64)
    form = Form(**{**FORM, "keys": tuple("abcdefghijklmnopqrstuvwxyz"), "key_words": 2, "values": ("up", "one")})
    _, _, asked = build_together(
        tokenizer, text, list(lengths), list(distances_for(lengths)), form, np.random.default_rng(0)
    )
    for length in lengths:
        found = [distance for of, distance in asked if of == length]
        assert min(found) == lengths[0] // 8
        assert max(found) > 0.8 * length  # nearly as far as the input goes


def test_the_study_of_a_pilot_trains_every_trial_on_the_same_tokens(place, monkeypatch):
    monkeypatch.chdir(place)
    recipe = load_resolved(place / "recipe.yaml", ["checkpoint.dir=out"])
    asked = Asked(place / "recipe.yaml", ("optim.warmup_steps=1",), place / "out", place / "train", tokens=2048)
    trained = {"a": {"optim.lr": 1e-3}, "b": {"optim.lr": 1e-4, "context.method": "short"}}
    path = place / "study.yaml"
    path.write_text(json.dumps(study_of(asked, recipe, [64, 128], {"yarn": {"context.rope.type": "yarn"}}, trained)))
    study: Study = read_study(path)
    assert [(trial.name, trial.trained) for trial in study.trials] == [
        ("base", False),
        ("yarn", False),
        ("a", True),
        ("b", True),
    ]
    assert {trial.tokens for trial in study.trials if trial.trained} == {2048}
    assert study.evaluation["recall_together"] is True


def test_a_pilot_takes_what_recalls_most_of_that_which_keeps_the_window():
    rows = [BASE, row("linear", 3.5, 3.5, 0.1), row("yarn", 3.02, 3.1, 0.5)]
    assert best_scaling(rows, WINDOW).name == "yarn"
    rows += [row("end_prompt_lr0.0001", 3.2, 3.0, 0.9, True), row("end_prompt_lr0.00002", 3.03, 3.05, 0.6, True)]
    chosen, reason = recommend(rows, WINDOW)
    assert chosen.name == "end_prompt_lr0.00002"
    assert "costs +0.030 nats inside the window and recalls 60% beyond it (base: 0%)" in reason


def test_a_pilot_says_when_training_or_the_method_adds_nothing():
    rows = [BASE, row("yarn", 3.02, 3.1, 0.5), row("end_prompt_lr0.0001", 3.04, 3.2, 0.4, True)]
    chosen, reason = recommend(rows, WINDOW)
    assert chosen.name == "yarn"
    assert "No training of this length improved on scaling the positions alone." in reason
    chosen, reason = recommend([*rows, row("short_lr0.0001", 3.0, 3.1, 0.6, True)], WINDOW)
    assert chosen.name == "short_lr0.0001"
    assert "no gain is attributable to the method" in reason


def test_a_pilot_says_when_everything_costs_too_much_inside_the_window():
    chosen, reason = recommend([BASE, row("linear", 3.5, 3.5, 0.9), row("yarn", 3.2, 3.1, 0.5)], WINDOW)
    assert chosen.name == "yarn"
    assert "costs least inside the window, yet +0.200 nats, more than 0.05" in reason


def test_the_table_of_a_pilot_names_what_was_not_trained():
    table = as_text([BASE, row("yarn", 3.2, 3.1, 0.5), row("end_prompt_lr0.0001", 3.2, 3.0, 0.9, True)], WINDOW)
    assert "yarn, untrained" in table
    assert "base, untrained" not in table
    assert "The model's own window: 64 tokens" in table


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--types", ","], ["--types", "linear,ntk,yarn"]),
        (["--text", "nosuch"], ["--text nosuch", "no such file"]),
        (["optim.lr"], ["optim.lr"]),
        (["--types", "nosuch"], ["--types nosuch", "linear"]),
        (["--rates", "0"], ["--rates 0", "above 0"]),
        (["--tokens", "0"], ["--tokens 0", "at least 1"]),
        (["context.target=64"], ["context.target=64", "nothing to extend"]),
        (["--lengths", "128,256"], ["--lengths 128,256", "inside the window of 64"]),
    ],
)
def test_a_pilot_that_cannot_be_run_is_refused_in_one_line(place, arguments, needles):
    assert_one_line_error(pilot(place, *arguments), *needles)
    assert not (place / "pilot").exists()


@pytest.mark.full
def test_a_pilot_measures_recommends_and_does_nothing_twice(place):
    (place / "form.json").write_text(json.dumps(FORM))
    options = [
        *("--types", "linear", "--rates", "1e-3", "--tokens", "2048", "--lengths", "64,128,256", "--passage", "8"),
        *("--recall-distances", "20,44", "--recall-form", "form.json", "--dtype", "float32"),
    ]
    first = pilot(place, *options)
    assert first.returncode == 0, first.stderr + first.stdout
    results = json.loads((place / "pilot" / "pilot.json").read_text())
    assert [r["name"] for r in results["rows"]] == ["base", "linear", "end_prompt_lr0.001", "short_lr0.001"]
    assert all(set(r["loss"]) == {"64", "128", "256"} for r in results["rows"])
    assert results["reason"] in first.stdout
    again = pilot(place, *options)
    assert "4 of 4 trials are already done" in again.stdout
    assert json.loads((place / "pilot" / "pilot.json").read_text()) == results
