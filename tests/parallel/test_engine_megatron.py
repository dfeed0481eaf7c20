"""The Megatron engine against transformers: the same losses and the same greedy answers, in every layout.

In float64, where both agree to the last digits.  In float32, once a layout, ours are as exact as transformers' are.
"""

import json

import numpy as np
import pytest
from float64 import in_float64, widened
from parallel.reference import EXACT, assert_as_exact
from small import run_tool, small_llama, text

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine
from endprompt_megatron.evaluate.preparation import model_at

LAYOUTS = {"one": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2-pp2": (2, 2)}
ROPES = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        **{"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        **{"short_factor": [1 + i / 20 for i in range(8)], "long_factor": [1 + i / 2 for i in range(8)]},
    },
}
PROMPT, EXPECTED = 50, [7, 8, 9]


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 300, (rows, length))


def jumped(rows: int, length: int) -> np.ndarray:
    """Row by row another jump, as EndPrompt's positions have it."""
    positions = np.tile(np.arange(length), (rows, 1))
    positions[:, 60:] += 100 * (1 + np.arange(rows))[:, None]
    return positions


def asked(engine) -> dict:
    """All that an engine can be asked, of one input."""
    ids = tokens(2, 90)
    answer = engine.answer(ids[0, :PROMPT].tolist(), EXPECTED, 6)
    ends, engine.end_ids = engine.end_ids, {answer.generated[3]}
    ended = engine.generate(ids[0, :PROMPT].tolist(), 6)
    engine.end_ids = ends
    return {
        "whole": engine.token_losses(ids),
        "last": engine.token_losses(ids, last=17),
        "jumped": engine.token_losses(ids, jumped(2, 90)),
        "generated": answer.generated,
        "logprobs": answer.logprobs,
        "ranks": answer.ranks,
        "again": engine.generate(ids[0, :PROMPT].tolist(), 6),
        "ended": ended,
        "asked to end": engine.generate(ids[0, :PROMPT].tolist(), 6, lambda generated: len(generated) == 2),
    }


def ask_megatron(source, layout, chunk) -> dict:
    """On a rank."""
    from endprompt_megatron.evaluate.engines import megatron_engine

    model = model_at(source)
    megatron_engine.start(*layout, model.config)
    engine = megatron_engine.MegatronEngine(model.weights, model.config, dtype="float32", chunk=chunk)
    engine.end_ids = set()
    return asked(engine) | {"described": engine.describe()}


def ask_transformers(hf) -> dict:
    engine = TransformersEngine(hf, "cpu", dtype="float32")
    engine.model = widened(engine.model)
    engine.end_ids = set()
    return asked(engine)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each small model once, in both forms, and what transformers answers; a vocabulary that TP 2 must pad."""
    made = {}

    def get(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            rope = {"rope_parameters": ROPES[name]} if ROPES[name] else {}
            small_llama(place / "hf", vocab_size=321, **rope)
            convert_hf_to_megatron(place / "hf", place / "megatron")
            made[name] = place, in_float64(ask_transformers, place / "hf")
        return made[name]

    return get


def compare(found: dict, expected: dict) -> None:
    for name in ("whole", "last", "jumped"):
        assert found[name][0].shape == expected[name][0].shape
        np.testing.assert_allclose(found[name][0], expected[name][0], rtol=EXACT, atol=EXACT, err_msg=name)
        assert (found[name][1] == expected[name][1]).all(), name
    for name in ("generated", "again", "ended", "asked to end"):
        assert found[name] == expected[name], name
    np.testing.assert_allclose(found["logprobs"], expected["logprobs"], rtol=EXACT, atol=EXACT)
    assert (found["ranks"] == expected["ranks"]).all()


@pytest.mark.parametrize(
    "chunk", [pytest.param(16, id="chunks"), pytest.param(4096, id="whole", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_answers_equal_transformers(ranks, models, layout, chunk):
    place, expected = models("plain")
    tensor, pipeline = LAYOUTS[layout]
    results = ranks.run(tensor * pipeline, in_float64, ask_megatron, place / "megatron", (tensor, pipeline), chunk)
    assert len(expected["generated"]) == 6
    assert len(expected["ended"]) == expected["generated"].index(expected["generated"][3])
    assert len(expected["asked to end"]) == 2
    for found in results:  # every rank knows
        compare(found, expected)
        assert (found["described"]["tensor"], found["described"]["pipeline"]) == (tensor, pipeline)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_in_float32_are_as_exact_as_those_of_transformers(ranks, models, layout):
    place, expected = models("plain")
    rounded = ask_transformers(place / "hf")
    tensor, pipeline = LAYOUTS[layout]
    for found in ranks.run(tensor * pipeline, ask_megatron, place / "megatron", (tensor, pipeline), 16):
        for name in ("whole", "jumped"):
            assert found[name][0].dtype == np.float32
            assert_as_exact(found[name][0], rounded[name][0], expected[name][0])


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "plain"])
def test_scaled_rope_is_that_of_the_checkpoints_config(ranks, models, rope):
    place, expected = models(rope)
    for found in ranks.run(2, in_float64, ask_megatron, place / "megatron", (1, 2), 16):
        compare(found, expected)


def test_the_layout_follows_from_the_ranks_and_wrong_ones_are_refused(ranks, models):
    place, expected = models("plain")
    for found in ranks.run(2, in_float64, ask_megatron, place / "megatron", (1, None), 4096):
        compare(found, expected)
        assert found["described"]["pipeline"] == 2
    for world, layout, message in (
        (1, (3, 1), "--tensor 3: does not divide num_attention_heads=4"),
        (1, (2, 1), "--tensor 2: does not divide the 1 ranks"),
        (3, (1, 3), "--pipeline 3: does not divide num_hidden_layers=4"),
        (2, (2, 2), "--tensor 2 --pipeline 2: 4 do not divide the 2 ranks"),
    ):
        with pytest.raises(AssertionError, match=message):
            ranks.run(world, ask_megatron, place / "megatron", layout, 16)


@pytest.mark.full
@pytest.mark.parametrize("layout", [["--tensor", 2], ["--pipeline", 1]], ids=["tp2", "dp2"])
def test_the_tool_measures_a_checkpoint_as_it_measures_its_export(models, tmp_path, layout):
    """The ranks of one model ask the same together; those of two share the questions."""
    place, _ = models("linear")
    (tmp_path / "book.txt").write_text(text(1500))
    options = ["--lengths", "100,300", "--scored", 32, "--samples", 3, "--depths", "0.5", "--needle-lengths", 400]
    options += ["--physical", 32, "--distances", "32,128", "--text", tmp_path / "book.txt", "--dtype", "float32"]
    options += ["--beyond-window", "--stride", 40]
    plain = ["--hf", place / "hf", "--threads", 1]
    in_place = ["--engine", "megatron", "--megatron", place / "megatron", "--processes", 2, *layout]
    results = {}
    for name, model in (("plain", plain), ("in place", in_place)):
        done = run_tool("evaluate", *model, *options, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Passkey retrieval") == 1
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    for name, found in results.items():
        assert len(found["scores"]["extended"]) == 2 + 1 + 4 + 8, name
    for score, expected in zip(*(results[name]["scores"]["extended"] for name in ("in place", "plain")), strict=True):
        assert score.keys() == expected.keys()
        for key, value in expected.items():
            close = key in ("score", "interval")
            assert score[key] == (pytest.approx(value, rel=1e-4, abs=1e-4) if close else value), (score, expected)
    described = results["in place"]["models"]["extended"]
    assert (described["engine"], described["tensor"], described["window"]) == ("megatron", 2 if 2 in layout else 1, 64)
    parts = sorted(path.name for path in (tmp_path / "in place" / "answers").glob("*.jsonl"))
    assert len(parts) == (1 if 2 in layout else 2)
    again = run_tool("evaluate", *in_place, *options, "--out", tmp_path / "in place")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "in place" / "results.json").read_text())["scores"] == results["in place"]["scores"]
