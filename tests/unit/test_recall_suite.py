"""Facts by distance: where they stand, what is scored, and what is refused."""

import json

import numpy as np
import pytest

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.base import branch_losses
from endprompt_megatron.evaluate.requests import responses
from endprompt_megatron.evaluate.suites import recall_inputs, recall_suite
from endprompt_megatron.tokenizer import load_tokenizer

FORM = recall_inputs.Form(
    fact=" it {key} {value} out",
    question=" if {key}",
    keys=("who", "their", "would"),
    key_words=1,
    values=("up", "one", "been"),
    value_words=2,
)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(model_dir)


@pytest.fixture(scope="module")
def text(tokenizer):
    """Held-out text without any of the keys, but with the values."""
    words = "the of and to in is was for with up one been at but not".split()
    return np.asarray(tokenizer.encode(" ".join(np.random.default_rng(3).choice(words, 900))), dtype=np.int64)


@pytest.mark.parametrize("distance", [20, 64, 100])
def test_a_recall_answer_stands_at_its_distance_from_the_fact_and_ends_the_input(tokenizer, text, distance):
    for sample in range(5):
        row, count = recall_inputs.build_row(tokenizer, text, 128, distance, FORM, np.random.default_rng(sample))
        assert row.shape == (128,)
        answer = row[-count:].tolist()
        stated = 128 - count - distance
        assert row[stated : stated + count].tolist() == answer
        words = tokenizer.decode(answer).split()
        assert len(words) == 2
        assert set(words) <= set(FORM.values)
        whole = tokenizer.decode(row.tolist())
        (key,) = [key for key in FORM.keys if f" {key} " in whole]
        assert whole.count(f" {key} ") == 2
        assert whole.endswith(f" if {key} {' '.join(words)}")


def test_recall_inputs_depend_on_the_seed_and_not_on_what_else_is_asked(tokenizer, text):
    def contents(lengths: list[int], **options) -> dict:
        found = recall_inputs.recall_requests(tokenizer, text, lengths, FORM, samples=3, **options)
        return {(request.length, request.task): request.content for request in found}

    few, more = contents([128], distances=[64]), contents([128, 256], distances=[32, 64])
    assert more[128, "64"] == few[128, "64"]
    assert contents([128], distances=[64], seed=1) != few
    assert set(more) == {(128, "32"), (128, "64"), (256, "32"), (256, "64")}


def test_recall_scores_equal_those_of_a_full_forward(engine, tokenizer, text):
    import torch

    given = responses(engine, recall_inputs.recall_requests(tokenizer, text, [96], FORM, distances=[40], samples=4))
    expected = {"recalled": [], "loss": []}
    for sample in range(4):
        rng = np.random.default_rng([0, 96, 40, sample])
        row, count = recall_inputs.build_row(tokenizer, text, 96, 40, FORM, rng)
        tokens = torch.tensor(row[None])
        with torch.inference_mode():
            logits = engine.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")[-count:]
        expected["loss"].append(losses.mean().item())
        expected["recalled"].append(bool((logits[:-1].argmax(-1) == tokens[0, 1:])[-count:].all()))
    (cell,) = recall_suite.result(given)["cells"]
    assert (cell["length"], cell["distance"], cell["samples"]) == (96, 40, 4)
    series = {each.key: each.strata[0] for each in recall_suite.series(given)}
    for task in ("40", "all distances"):
        np.testing.assert_allclose(series["recall", task, 96, "loss"], expected["loss"], rtol=1e-5)
        assert series["recall", task, 96, "recalled"].tolist() == expected["recalled"]


def test_recall_inputs_are_batched_and_counted_in_advance(tokenizer, text, monkeypatch):
    monkeypatch.setattr(recall_inputs, "AT_ONCE", 256)
    made = list(recall_inputs.recall_requests(tokenizer, text, [128, 256], FORM, distances=[40, 200], samples=3))
    assert [item.tokens for item in made] == [256, 128, *[256] * 6]
    assert recall_inputs.expected([128, 256], [40, 200], 3, False) == (len(made), sum(item.tokens for item in made))


def test_default_recall_distances_reach_from_near_to_seven_eighths_of_the_length(tokenizer, text):
    assert recall_inputs.default_distances(512) == [64, 128, 256, 384, 448]
    assert len(list(recall_inputs.recall_requests(tokenizer, text, [512], recall_inputs.Form()))) == 5


@pytest.mark.parametrize(
    ("length", "distance", "needle"),
    [
        (128, 127, "--recall-distances 127: in 128 tokens a fact stands"),
        (128, 2, "--recall-distances 2: in 128 tokens a fact stands"),
        (16, 10, "--recall-distances 10: in 16 tokens"),
        (5000, 64, "--lengths 5000: the held-out text has"),
    ],
)
def test_a_recall_distance_that_does_not_fit_is_refused(tokenizer, text, length, distance, needle):
    with pytest.raises(InputError, match=needle):
        recall_inputs.build_row(tokenizer, text, length, distance, FORM, np.random.default_rng(0))


def test_the_recall_distances_that_an_error_names_can_be_used(tokenizer, text):
    for wrong in (2, 127):
        with pytest.raises(InputError, match=r"stands \d+ to \d+ tokens before") as raised:
            recall_inputs.build_row(tokenizer, text, 128, wrong, FORM, np.random.default_rng(0))
        bound = int(
            str(raised.value).split("stands ")[1].split(" to " if wrong == 2 else " tokens before")[0].split()[-1]
        )
        recall_inputs.build_row(tokenizer, text, 128, bound, FORM, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("form", "needle"),
    [
        ({"facts": "x"}, "unknown facts"),
        ({"fact": "no key"}, r"fact='no key' should have \{key\} in it"),
        ({"keys": []}, "keys should be a list of words"),
        ({"values": [1]}, "values should be a list of words"),
        ({"fact": 5}, "fact=5 should be a text"),
        ({"key_words": "two"}, "key_words='two' should be a number"),
        ({"value_words": 0}, "value_words=0 should be a number, at least 1"),
        ({"keys": ["one"]}, "key_words=2, but keys has 1 words"),
        ({"question": " {key} {who}"}, "should have no braces but {key} and {value}"),
    ],
)
def test_a_recall_form_that_cannot_be_used_is_refused(tmp_path, form, needle):
    path = tmp_path / "form.json"
    path.write_text(json.dumps(form))
    with pytest.raises(InputError, match=needle):
        recall_inputs.read_form(path)


def test_a_recall_form_whose_keys_are_all_in_the_text_is_refused(tokenizer, text):
    form = recall_inputs.Form(keys=("the",), key_words=1)
    with pytest.raises(InputError, match="all keys are in 128 tokens of the text already"):
        recall_inputs.build_row(tokenizer, text, 128, 64, form, np.random.default_rng(0))


def test_a_written_recall_form_reads_back_equal(tmp_path):
    path = tmp_path / "form.json"
    path.write_text(recall_inputs.form_as_json(FORM))
    assert recall_inputs.read_form(path) == FORM


LENGTHS, DISTANCES = [128, 200, 344], [40, 112, 184, 328]


def together(tokenizer, text, seed: int = 0):
    rng = np.random.default_rng([seed, 0])
    return recall_inputs.build_together(tokenizer, text, LENGTHS, DISTANCES, MANY, rng)


MANY = recall_inputs.Form(
    fact=" it {key} {value} out",
    question=" if {key}",
    keys=("who", "their", "would", "which", "more", "when"),
    key_words=2,
    values=("up", "one", "been"),
    value_words=2,
)


def test_facts_together_stand_at_the_exact_distance_of_every_length(tokenizer, text):
    for seed in range(5):
        row, branches, asked = together(tokenizer, text, seed)
        assert asked == [(128, 40), (128, 112), (200, 40), (200, 112), (200, 184), *((344, each) for each in DISTANCES)]
        keys = set()
        for branch, (length, distance) in zip(branches, asked, strict=True):
            whole = [*row[: branch.after].tolist(), *branch.ids]
            assert len(whole) == length
            answer = whole[-branch.scored :]
            stated = length - branch.scored - distance
            assert whole[stated : stated + branch.scored] == answer
            said, key = tokenizer.decode(whole), tokenizer.decode(branch.ids[: -branch.scored]).removeprefix(" if ")
            assert said.count(f"{key} {tokenizer.decode(answer).strip()}") == 2  # stated, and asked for
            keys.add((key, length - distance))
        # One fact for a place, however often it is asked: 328 before 344 is 112 before 128.
        assert len(keys) == len({key for key, _ in keys}) == len({length - distance for length, distance in asked})


def test_facts_together_are_scored_as_a_full_forward_of_each_question_scores_them(engine, tokenizer, text):
    import torch

    asked = recall_inputs.requests_together(tokenizer, text, LENGTHS, MANY, distances=DISTANCES, samples=2)
    given = responses(engine, asked)
    for sample, response in enumerate(given):
        rng = np.random.default_rng([0, sample])
        row, branches, _ = recall_inputs.build_together(tokenizer, text, LENGTHS, DISTANCES, MANY, rng)
        for branch, fact in zip(branches, response.record["facts"], strict=True):
            tokens = torch.tensor([[*row[: branch.after].tolist(), *branch.ids]])
            with torch.inference_mode():
                logits = engine.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
            right = (logits[:-1].argmax(-1) == tokens[0, 1:])[-branch.scored :]
            assert fact["loss"] == pytest.approx(losses[-branch.scored :].mean().item(), rel=1e-4)
            assert fact["recalled"] == bool(right.all())
    cells = recall_suite.result(given)["cells"]
    assert {(cell["length"], cell["distance"], cell["samples"]) for cell in cells} == {
        (length, distance, 2) for length in LENGTHS for distance in DISTANCES if distance < length
    }
    assert {each.length for each in recall_suite.series(given)} == set(LENGTHS)


def test_one_passage_is_scored_behind_every_length_of_text(engine, tokenizer, text):
    import torch

    asked = recall_inputs.requests_together(tokenizer, text, LENGTHS, MANY, distances=DISTANCES, samples=2, passage=30)
    given = responses(engine, asked)
    row, branches, asked = recall_inputs.build_together(
        tokenizer, text, LENGTHS, DISTANCES, MANY, np.random.default_rng([0, 1]), 30
    )
    for length, branch, found in zip(LENGTHS, branches[len(asked) :], given[1].record["passage"], strict=True):
        assert branch.ids == text[-60:].tolist()
        assert found["length"] == length
        tokens = torch.tensor([[*row[: branch.after].tolist(), *branch.ids]])
        assert length - 20 <= tokens.shape[1] <= length  # shorter where a fact would be cut
        with torch.inference_mode():
            logits = engine.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].double()
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
        assert np.mean(found["blocks"]) == pytest.approx(losses[-30:].mean().item(), rel=1e-4)
    measured = recall_suite.result(given)["passage"]
    assert [each["length"] for each in measured] == LENGTHS
    series = {each.key: each.strata[0] for each in recall_suite.series(given)}
    for each in measured:
        assert each["loss"] == pytest.approx(series["recall", "passage", each["length"], "loss"].mean())
    assert "passage" not in recall_suite.result(
        responses(engine, recall_inputs.requests_together(tokenizer, text, [128], MANY, distances=[40]))
    )


def test_a_passage_longer_than_half_of_the_shortest_input_is_refused(tokenizer, text):
    with pytest.raises(InputError, match="--recall-passage 64: --lengths 128 should be above 128, twice as many"):
        recall_inputs.build_together(tokenizer, text, [128], [40], MANY, np.random.default_rng(0), 64)


def test_an_engine_that_cannot_go_on_from_a_place_reads_each_question_alone(engine, tokenizer, text):
    class Plain:
        token_losses = staticmethod(engine.token_losses)

    row, branches, _ = together(tokenizer, text)
    for ours, alone in zip(branch_losses(engine, row, branches), branch_losses(Plain(), row, branches), strict=True):
        np.testing.assert_allclose(ours[0], alone[0], rtol=1e-4)
        assert (ours[1] == alone[1]).all()


@pytest.mark.parametrize(
    ("lengths", "distances", "needle"),
    [
        ([128], [40, 42], "begins . tokens before another one ends"),
        ([128, 256], [136, 40], "in 128 tokens the question comes in the middle of the fact"),
    ],
)
def test_facts_together_that_do_not_fit_side_by_side_are_refused(tokenizer, text, lengths, distances, needle):
    with pytest.raises(InputError, match=needle):
        recall_inputs.build_together(tokenizer, text, lengths, sorted(distances), MANY, np.random.default_rng(0))
