"""What is measured with an engine, against counting by hand."""

import itertools
import json

import numpy as np
import pytest
import small
from unit.test_engine import natural, reference_losses

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate import held_out_text
from endprompt_megatron.evaluate.engines.transformers_engine import TransformersEngine
from endprompt_megatron.evaluate.evaluation import evaluate
from endprompt_megatron.evaluate.preparation import Model
from endprompt_megatron.evaluate.registry import Settings
from endprompt_megatron.evaluate.requests import responses
from endprompt_megatron.evaluate.suites import needle, perplexity, virtual
from endprompt_megatron.method import virtual_probe
from endprompt_megatron.tokenizer import load_tokenizer

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


class CountingEngine:
    """Losses that say which token they belong to: its id, one unit a token."""

    def token_losses(self, tokens, position_ids=None, *, last=None):
        losses = tokens[:, 1:].astype(np.float32)
        return losses[:, -(last or losses.shape[1]) :], losses > 0


def test_perplexity_scores_the_same_tokens_at_every_length_and_every_token_once_by_position():
    rows = np.stack([np.arange(100), np.arange(100) + 2])
    result = perplexity.result(
        responses(CountingEngine(), perplexity.requests_by_length(rows, [20, 50, 100], scored=10))
    )
    for entry in result["by_length"]:
        assert entry["windows"] == [94.5, 96.5]  # mean of 90..99, and 2 more
        assert entry["loss"] == 95.5
        assert entry["stderr"] == pytest.approx(1.0)  # two windows 2 apart: std sqrt(2), over sqrt(2)
    buckets = result["by_position"]
    assert [buckets[0]["start"], buckets[-1]["end"]] == [0, 100]
    for before, after in itertools.pairwise(buckets):
        assert before["end"] == after["start"]
    for bucket in buckets:
        ids = np.arange(max(bucket["start"], 1), bucket["end"])
        assert bucket["loss"] == pytest.approx(ids.mean() + 1)


def test_windows_do_not_overlap_and_short_texts_are_refused():
    tokens = np.arange(1000)
    for length, count in ((100, 10), (100, 3), (999, 1), (1000, 1), (333, 3)):
        rows = held_out_text.windows(tokens, length, count)
        assert rows.shape == (count, length)
        assert (np.diff(rows, axis=1) == 1).all()
        assert (np.diff(rows[:, 0]) >= length).all()
        assert rows[0, 0] >= 0
    with pytest.raises(InputError, match="--lengths 1001: the held-out text has only 1000 tokens"):
        held_out_text.windows(tokens, 1001, 1)
    with pytest.raises(InputError, match=r"--windows 4: .* use --windows 3"):
        held_out_text.windows(tokens, 300, 4)


@pytest.mark.parametrize("filler", [None, np.arange(100, 200).repeat(50)], ids=["noise", "text"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_passkey_prompt_has_the_exact_length_and_the_key_at_its_depth(model_dir, filler, depth):
    tokenizer = load_tokenizer(model_dir)
    prompt = needle.build_prompt(tokenizer, "31415", 2000, depth, filler, np.random.default_rng(0))
    assert len(prompt) == 2000
    decoded = tokenizer.decode(prompt)
    assert decoded.count("The pass key is 31415. Remember it. 31415 is the pass key.") == 1
    assert decoded.startswith(needle.TASK)
    assert decoded.endswith(needle.QUESTION)
    hidden = tokenizer.encode(needle.NEEDLE.format(key="31415"))
    places = [at for at in range(len(prompt)) if prompt[at : at + len(hidden)] == hidden]
    task, question = len(tokenizer.encode(needle.TASK)), len(tokenizer.encode(needle.QUESTION))
    room = 2000 - task - question - len(hidden)
    assert abs(places[0] - task - depth * room) <= len(tokenizer.encode(needle.NOISE))


class Answering:
    """Finds the key by reading the prompt, and answers in the given way."""

    def __init__(self, tokenizer, form):
        self.tokenizer, self.form = tokenizer, form

    def answer(self, prompt_ids, expected, max_new_tokens):
        from endprompt_megatron.evaluate.engines.base import Answer

        decoded = self.tokenizer.decode(prompt_ids)
        key = decoded.split("The pass key is ")[1][:5]
        ranks = np.zeros(len(expected), np.int64)
        ranks[0] = 5 if expected != self.tokenizer.encode(f" {key}") else 0
        return Answer(self.tokenizer.encode(self.form.format(key=key)), np.full(len(expected), -0.5), ranks)


def ask_needle(engine, tokenizer, lengths, **options):
    return needle.result(responses(engine, needle.passkey_requests(tokenizer, lengths, **options)))


@pytest.mark.parametrize(
    ("form", "correct"),
    [(" {key}.", 1.0), (": **{key}**", 1.0), (" {key}7", 0.0), (" 1 {key}", 0.0), (" the pass key", 0.0)],
)
def test_passkey_counts_exact_digits_and_repeats_by_seed(model_dir, form, correct):
    tokenizer = load_tokenizer(model_dir)
    results = [
        ask_needle(Answering(tokenizer, form), tokenizer, [400, 800], depths=[0.2, 0.8], samples=2, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1]
    keys = [{answer["key"] for cell in result["cells"] for answer in cell["answers"]} for result in results]
    assert len(keys[0]) == 8
    assert keys[0] != keys[2]
    for cell in results[0]["cells"]:
        assert (cell["accuracy"], cell["recall"], cell["logprob"]) == (correct, 1.0, -0.5)


def test_a_length_too_short_for_a_passkey_is_refused_with_the_minimum(model_dir):
    tokenizer = load_tokenizer(model_dir)
    with pytest.raises(InputError, match=r"--lengths 50: .* use (\d+) or more") as caught:
        ask_needle(Answering(tokenizer, ""), tokenizer, [50])
    least = int(str(caught.value).split("use ")[1].split()[0])
    ask_needle(Answering(tokenizer, ""), tokenizer, [least])


@pytest.mark.parametrize("kind", virtual.KINDS)
def test_virtual_probe_is_an_end_prompt_geometry_with_the_same_tokens_at_every_distance(kind):
    stream = np.random.default_rng(0).integers(0, 50000, 5000)
    distances = virtual.default_distances(64, 1000)
    assert distances == [64, 128, 256, 512, 1000]
    probes = virtual.probe_inputs(stream, physical_len=64, distances=distances, samples=5, seed=3, kind=kind)
    again = virtual.probe_inputs(stream, physical_len=64, distances=distances, samples=5, seed=3, kind=kind)
    for probe, same, distance in zip(probes, again, distances, strict=True):
        assert probe["distance"] == distance
        assert (probe["tokens"] == probes[0]["tokens"]).all()
        assert (probe["tokens"] == same["tokens"]).all()
        assert probe["tokens"].shape == probe["position_ids"].shape == (5, 64)
        assert probe["tokens"].dtype == probe["position_ids"].dtype == np.int64
        assert probe["scored"].shape == (5, 63)
        expected = [*range(48), *range(distance - 16, distance)]
        assert probe["position_ids"].tolist() == [expected] * 5
        assert not probe["scored"][:, :48].any()  # predictions made in the context do not look across the jump
        assert probe["scored"][:, 51:].all()
    assert (probes[0]["position_ids"] == np.arange(64)).all()  # at D = s there is no jump
    for row in probes[0]["tokens"]:
        source = [at for at in range(33) if (row[at : at + 16] == row[48:]).all()]
        assert bool(source) == (kind == "repeat")


def test_virtual_summary_counts_only_what_is_scored():
    losses = np.array([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])
    correct = np.array([[True, False, True], [False, False, False]])
    scored = np.array([[False, True, True], [False, False, True]])
    assert virtual_probe.summarise(losses, correct, scored) == {"loss": 4.0, "accuracy": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"physical_len": 8}, "too short"),
        ({"distances": [32]}, "below the row's 64 tokens"),
        ({"kind": "other"}, "unknown kind"),
        ({"token_stream": np.arange(63)}, "needs 64"),
    ],
)
def test_virtual_probe_refuses_what_it_cannot_build(change, message):
    options = {"token_stream": np.arange(500), "physical_len": 64, "distances": [64], "samples": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        virtual.probe_inputs(options.pop("token_stream"), **options)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(small.text(4000))
    return path


def models(extended, baseline=None):
    labels = {"baseline": baseline, "extended": extended}
    return {label: Model(path, path) for label, path in labels.items() if path is not None}


def in_transformers(model):
    return TransformersEngine(model.weights, "cpu", dtype="float32")


def test_evaluate_tool_measures_two_models_and_repeats_exactly(tmp_path, model_dir, book):
    base = small.small_llama(tmp_path / "base", seed=1)
    arguments = ["--hf", model_dir, "--baseline", base, "--lengths", "300,600", "--scored", 64, "--text", book]
    arguments += ["--physical", 32, "--distances", "32,64,128", "--depths", "0.5", "--dtype", "float32"]
    arguments += ["--beyond-window"]
    first = small.run_tool("evaluate", *arguments, "--out", tmp_path / "a", "--threads", 1)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert list(results["measurements"]) == ["baseline", "extended"]
    for name in ("perplexity", "needle", "virtual"):
        assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for key in ("settings", "text", "versions", "models", "seconds", "created"):
        assert results[key]
    settings = Settings(**results["settings"])
    again = evaluate(settings, models(model_dir, base), tmp_path / "b", in_transformers)
    for label in ("baseline", "extended"):
        old, new = results["measurements"][label], again["measurements"][label]
        for length in (0, 1):
            assert old["perplexity"]["by_length"][length]["loss"] == pytest.approx(
                new["perplexity"]["by_length"][length]["loss"], rel=1e-5
            )
        assert [c["answers"][0]["key"] for c in old["needle"]["cells"]] == [
            c["answers"][0]["key"] for c in new["needle"]["cells"]
        ]
        assert list(old["virtual"]["repeat"]) == ["32", "64", "128"]
    # The tool's numbers are those of an independent forward over the same window.
    ids = np.asarray(load_tokenizer(model_dir).encode(book.read_text()))
    window = held_out_text.windows(ids, 600, 2)[0][None, -300:]
    engine = TransformersEngine(model_dir, "cpu", dtype="float32")
    losses, _ = reference_losses(engine.model, window, natural(window))
    measured = results["measurements"]["extended"]["perplexity"]["by_length"][0]["windows"][0]
    assert measured == pytest.approx(float(losses[0, -64:].mean()), rel=1e-5)
    for number in (f"{results['measurements']['baseline']['perplexity']['by_length'][1]['loss']:.3f}", "300", "128"):
        assert number in first.stdout


def test_held_out_text_may_be_a_prepared_dataset(tmp_path, model_dir, book):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode(book.read_text())
    builder = IndexedDatasetBuilder(str(tmp_path / "book.bin"), dtype=np.uint16)
    for start in range(0, len(ids), 1000):
        builder.add_document(ids[start : start + 1000], [len(ids[start : start + 1000])])
    builder.finalize(str(tmp_path / "book.idx"))
    prepared, plain = held_out_text.held_out(tmp_path / "book", tokenizer), held_out_text.held_out(book, tokenizer)
    assert prepared.sha256 == plain.sha256
    (tmp_path / "book.idx").write_bytes(b"broken")
    with pytest.raises(InputError, match="not a readable indexed dataset"):
        held_out_text.held_out(tmp_path / "book", tokenizer)


BAD = {
    "no model": ({"--hf": "{tmp}/none"}, "none: no such directory"),
    "unknown suite": ({"--suite": "neddle"}, "--suite neddle: unknown"),
    "no suite": ({"--suite": ","}, "names no suite"),
    "lengths not numbers": ({"--lengths": "4k"}, "--lengths 4k: should be integers"),
    "lengths unsorted": ({"--lengths": "600,300"}, "should ascend without repeats; use 300,600"),
    "lengths negative": ({"--lengths": "-5,300"}, "should be positive"),
    "no text": ({"--text": None}, "--text: missing"),
    "text missing": ({"--text": "{tmp}/none.txt"}, "none.txt: no such file"),
    "text empty": ({"--text": "{tmp}/empty.txt"}, "empty.txt: holds no text"),
    "text not utf-8": ({"--text": "{tmp}/latin.txt"}, "latin.txt: cannot be read as UTF-8"),
    "text too short": ({"--lengths": "100000"}, "the held-out text has"),
    "scored too many": ({"--scored": "300"}, "should be above the 300 scored tokens"),
    "out exists": ({"--out": "{tmp}/full"}, "full: already exists and holds no evaluation"),
    "dtype": ({"--dtype": "int4"}, "--dtype int4: unknown"),
    "depths": ({"--depths": "0.5,1.5"}, "should be between 0 and 1"),
    "samples": ({"--samples": "0"}, "--samples 0: should be at least 1"),
    "baseline missing": ({"--baseline": "{tmp}/none"}, "none: no such directory"),
    "other tokenizer": ({"--baseline": "{tmp}/other"}, "its tokenizer is not that of"),
    "beyond the window": ({"--beyond-window": None}, "--lengths 600: above the window of 64 of"),
    "engine": ({"--engine": "tensorrt"}, "--engine tensorrt: unknown; use one of transformers, vllm, megatron"),
    "no longbench data": ({"--suite": "longbench"}, "--longbench-data: missing; --suite longbench needs"),
    "part": ({"--part": "4/4"}, "--part 4/4: should be I/N with I from 0 to N-1"),
    "nothing to merge": ({"--merge": True}, "nothing was asked of the extended model with these settings"),
    "stride": ({"--stride": "64"}, "--stride 64: should be below the window of 64"),
    "megatron": ({"--hf": None, "--engine": "megatron", "--megatron": "{tmp}/none"}, "none: no such directory"),
    "both": (
        {"--megatron": "{tmp}/none", "--engine": "megatron"},
        "--hf: give either it, or --megatron RUN/checkpoints",
    ),
    "megatron in transformers": ({"--hf": None, "--megatron": "{tmp}"}, "needs --engine megatron"),
    "iteration": ({"--iteration": "3"}, "--iteration 3: applies only to --megatron, which is not given"),
    "pipeline": ({"--pipeline": "0"}, "--pipeline 0: should be at least 1"),
    "ruler samples": ({"--ruler-samples": "0"}, "--ruler-samples 0: should be at least 1"),
    "ruler template": (
        {"--suite": "perplexity,ruler", "--ruler-template": "llama"},
        "--ruler-template llama: unknown; use chat",
    ),
    "ruler template without ruler": ({"--ruler-template": "Phi3"}, "--ruler-template Phi3: applies only to the ruler"),
    "longbench-e without longbench": ({"--longbench-e": True}, "--longbench-e: applies only to the longbench suite"),
    "distances": ({"--distances": "16"}, "--distances 16: below the probe's 32 tokens"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "empty.txt").write_text(" \n")
    (tmp / "latin.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 10)
    (tmp / "full").mkdir()
    (tmp / "full" / "file").write_text("")
    small.small_llama(tmp / "other", tokenizer=False)
    small.small_tokenizer(tmp / "other", vocab_size=280)
    return tmp


@pytest.mark.parametrize("case", BAD)
def test_evaluate_tool_refuses_bad_input_in_one_line(case, places, model_dir, book, monkeypatch, capsys):
    import runpy
    import sys

    changes, message = BAD[case]
    options = {"--hf": model_dir, "--lengths": "300,600", "--scored": "64", "--text": book, "--physical": "32"}
    options |= {"--out": places / "out", "--threads": "1"} | changes
    options = {"--beyond-window": True} | options
    flags = [name for name, value in options.items() if value is True]
    pairs = [pair for pair in options.items() if pair[1] is not None and pair[1] is not True]
    words = flags + [str(word).format(tmp=places) for pair in pairs for word in pair]
    words = [f"--lengths={options['--lengths']}" if word == "--lengths" else word for word in words]
    words.remove(options["--lengths"])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    # In this process: 20 interpreters that import torch would take a minute.
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(small.ROOT / "tools" / "evaluate.py"), run_name="__main__")
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (places / "out").exists()
