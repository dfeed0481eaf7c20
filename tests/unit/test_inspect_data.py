"""What inspect_data.py says is what the trainer gets; statistics against a plain count; pictures are drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from small import assert_one_line_error, run_tool, small_llama, text
from unit.test_data import write_dataset

from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.data.describe.describe_data import describe
from endprompt_megatron.data.describe.document_lengths import at_least, lengths_of, percent, verdict
from endprompt_megatron.data.describe.segments import Segment, segments, weight_runs
from endprompt_megatron.data.indexed import token_dtype, write_idx
from endprompt_megatron.data.samples.builder import SampleBuilder, SampleSpec
from endprompt_megatron.data.samples.of_recipe import datasets_of
from endprompt_megatron.tokenizer import load_tokenizer

RECIPE = """
model: {hf: HF}
context: {method: end_prompt, target: 512, physical: 128, prompts: [EP_3], prompt_loss_weight: 0.25}
data: {train: {PREFIX: {weight: 3, prompts: ["text:the end of it all"]}, OTHER: 1}}
train: {steps: 6, global_batch_size: 4}
optim: {warmup_steps: 2}
checkpoint: {dir: RUN}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, two datasets of real text and a recipe."""
    root = tmp_path_factory.mktemp("inspect")
    small_llama(root / "hf", max_position_embeddings=128)
    tokenizer = load_tokenizer(root / "hf")
    for name, words in (("prefix", (40, 300, 5, 900)), ("other", (70, 80, 90))):
        documents = [[*tokenizer.encode(text(count, seed=count)), 1] for count in words]
        dtype = token_dtype(tokenizer.vocab_size)
        np.concatenate(documents).astype(dtype).tofile(root / f"{name}.bin")
        write_idx(root / f"{name}.idx", np.array([len(document) for document in documents]), dtype)
    recipe = RECIPE
    for name in ("prefix", "other", "hf", "run"):
        recipe = recipe.replace(name.upper(), str(root / name))
    (root / "recipe.yaml").write_text(recipe)
    return root


def test_segments_of_a_row_with_one_sample():
    builder = SampleBuilder(SampleSpec("end_prompt", 24, 100, [[1, 2, 3]], 0.5, 0))
    sample = builder.build(np.arange(21), 0)
    assert segments(sample) == [
        Segment(0, 21, "context", 0, ((0, 20),)),
        Segment(21, 24, "prompt", 0, ((97, 99),)),
    ]
    assert weight_runs(sample) == [(0, 20, 1.0), (20, 23, 0.5), (23, 24, 0.0)]
    pose = SampleBuilder(SampleSpec("pose", 24, 100, [], 1.0, 3)).build(np.arange(24), 1)
    [whole] = segments(pose)
    assert [p for first, last in whole.positions for p in range(first, last + 1)] == pose["position_ids"].tolist()
    assert (len(whole.positions), whole.kind) == (2, "context")


@pytest.mark.parametrize("said_by", ["sample_ids", "cu_seqlens"])
def test_segments_of_a_packed_row(said_by):
    lengths = (24, 10, 12)
    specs = [SampleSpec("end_prompt", length, 100, [[1, 2, 3]], 0.5, 0) for length in lengths]
    parts = [SampleBuilder(spec).build(np.arange(spec.physical_len), 0) for spec in specs]
    padding = {key: np.zeros(4, value.numpy().dtype) for key, value in parts[0].items()}
    row = {key: np.concatenate([part[key] for part in (*parts, padding)]) for key in padding}
    if said_by == "sample_ids":
        row["sample_ids"] = np.repeat([0, 1, 2, -1], (*lengths, 4))
    else:
        row["cu_seqlens"] = np.array([0, 24, 34, 46])
    assert [(s.start, s.stop, s.kind, s.sample) for s in segments(row)] == [
        (0, 21, "context", 0),
        (21, 24, "prompt", 0),
        (24, 31, "context", 1),
        (31, 34, "prompt", 1),
        (34, 43, "context", 2),
        (43, 46, "prompt", 2),
        (46, 50, "padding", -1),
    ]
    assert [s.positions for s in segments(row)[:6]] == [
        ((0, n),) if n < 90 else ((97, 99),) for n in (20, 97, 6, 97, 8, 97)
    ]


def test_inspect_data_describes_a_sample_as_it_is_trained_on(place):
    recipe = load_recipe(place / "recipe.yaml")
    dataset, _ = datasets_of(recipe, "recipe", 320, None)
    tokenizer = load_tokenizer(place / "hf")
    crossing = 0
    for index in range(len(dataset)):
        said, sample = describe(dataset, index, tokenizer), dataset[index]
        own = said["source"] == str(place / "prefix")
        context, prompt = said["segments"]
        assert prompt["text"] == ("the end of it all" if own else "End.")
        assert prompt["positions"] == ((512 - prompt["stop"] + prompt["start"], 511),)
        assert context["stop"] == prompt["start"] == 128 - len(tokenizer.encode(prompt["text"]))
        stream = np.memmap(f"{said['source']}.bin", dtype=np.uint16)
        lengths = np.fromfile(f"{said['source']}.idx", dtype=np.int32, offset=34, count=4 if own else 3)
        starts = np.cumsum(lengths) - lengths
        read = []
        for piece in said["documents"]:
            start = starts[piece["document"]]
            assert piece["length"] == lengths[piece["document"]]
            assert piece["start"] == len(read)
            read += stream[start + piece["first"] : start + piece["last"] + 1].tolist()
            assert piece["stop"] == len(read)
        assert read == sample["tokens"][: context["stop"]].tolist()
        crossing += len(said["documents"]) > 1
    assert crossing > 2


def test_inspect_data_shows_samples_sources_and_a_picture(place, tmp_path):
    done = run_tool("inspect_data", place / "recipe.yaml", "--samples", 2, "--picture", tmp_path / "rows.png")
    assert done.returncode == 0, done.stderr
    for needle in (
        f"sample 0: number 0 of {place / 'prefix'}, epoch 1",
        "prompt: ",
        "the end of it all",
        "loss weight of the next token: 1 for 0..",
        "0.25 for ",
        "the run takes 18 samples of it (75.0%)",
        "the run takes 6 samples of it (25.0%)",
        "of at least 512 tokens (context.target): 2 documents",
        "end_prompt needs no long documents",
    ):
        assert needle in done.stdout, done.stdout
    from PIL import Image

    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.width > 1000
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) > 50
        assert (colours == (0xEE, 0xF3, 0xF9)).all(1).sum() > 1000  # the model's own window, of its config.json
    assert not (place / "run").exists()  # a look leaves nothing behind
    as_json = run_tool("inspect_data", place / "recipe.yaml", "--json", "--start", 3, "--samples", 4)
    looked = json.loads(as_json.stdout)
    assert [sample["sample"] for sample in looked["samples"]] == [3, 4, 5, 6]
    assert [source["samples"] for source in looked["sources"]] == [18, 6]
    assert looked["long_enough"] is True


@pytest.mark.parametrize(
    "method",
    [
        "pose",
        "full",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("end_prompt_random", "end_prompt_pose", "short")),
    ],
)
def test_inspect_data_draws_every_method(place, tmp_path, method):
    from endprompt_megatron.data.describe.picture import draw

    overrides = [f"context.method={method}"]
    overrides += (
        ["data.document_ends=within", "context.content_skip=true", f"data.train={place / 'prefix'}"]
        if method == "pose"
        else []
    )
    overrides += ["context.physical=512", f"data.train={place / 'prefix'}"] if method == "full" else []
    recipe = load_recipe(place / "recipe.yaml", overrides)
    dataset, _ = datasets_of(recipe, "recipe", 320, None)
    draw(dataset, [0, 1], recipe.context, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_inspect_data_shows_packed_rows_sample_by_sample(place, tmp_path):
    keys = ["data.packing=documents", f"data.train={place / 'prefix'}", "context.physical=512"]
    done = run_tool("inspect_data", place / "recipe.yaml", *keys, "--samples", 2, "--picture", tmp_path / "rows.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    assert "data.packing=documents" in done.stdout
    looked = json.loads(run_tool("inspect_data", place / "recipe.yaml", *keys, "--samples", 8, "--json").stdout)
    dataset, _ = datasets_of(load_recipe(place / "recipe.yaml", keys), "recipe", 320, None)
    most = 0
    for sample in looked["samples"]:
        bounds = dataset[sample["sample"]]["cu_seqlens"].tolist()
        contexts = [segment for segment in sample["segments"] if segment["kind"] == "context"]
        most = max(most, len(contexts))
        assert [segment["start"] for segment in contexts] == bounds[: len(contexts)]
        assert [(each["start"], each["stop"]) for each in sample["documents"]] == [
            (segment["start"], segment["stop"]) for segment in contexts
        ]
    assert most > 1


def test_inspect_data_shows_a_dataset_without_a_recipe(place):
    done = run_tool(
        "inspect_data", "--prefix", place / "other", "--tokenizer", place / "hf", "--start", 1, "--samples", 2
    )
    assert done.returncode == 0, done.stderr
    assert "document 1, " in done.stdout
    assert "document 2, " in done.stdout
    assert "<|end_of_text|>" in done.stdout
    assert "3 documents, " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        ([], ["give a RECIPE.yaml, or --prefix"]),
        (["RECIPE", "--prefix", "x"], ["give a RECIPE.yaml, or --prefix"]),
        (["--prefix", "x"], ["--prefix x needs --tokenizer DIR"]),
        (["--prefix", "nowhere", "--tokenizer", "HF"], ["nowhere.idx: no such file"]),
        (["--prefix", "OTHER", "--tokenizer", "HF", "--start", "3"], ["--start 3", "documents 0 to 2"]),
        (["RECIPE", "--start", "24"], ["--start 24", "samples 0 to 23"]),
        (["RECIPE", "--samples", "-1"], ["--samples -1"]),
        (["RECIPE", "--picture", "rows.jpg"], ["--picture rows.jpg: should be a .png"]),
        (["RECIPE", "--picture", "/nowhere/rows.png"], ["a directory that exists"]),
        (["RECIPE", "--picture", "rows.png", "--samples", "7"], ["draws 1 to 6 samples"]),
        (["RECIPE", "data.train=nowhere"], ["nowhere.idx: no such file"]),
        (["RECIPE", "data.document_ends=inside"], ["data.document_ends=inside should be one of cross, within"]),
        (["RECIPE", "context.content_skip=true"], ["context.content_skip=true is PoSE's", "end_prompt"]),
        (["RECIPE", "context.content_skip=true", "context.method=pose"], ["data.document_ends=cross should be within"]),
        (["RECIPE", "data.min_document_tokens=-1"], ["data.min_document_tokens=-1 should be at least 0"]),
        (["RECIPE", "data.train={OTHER: {weight: 1, prompts: [EP_9]}}"], ["prompts of", "=EP_9: unknown prompt"]),
    ],
)
def test_inspect_data_refuses_wrong_arguments_in_one_line(place, arguments, needles):
    names = {"RECIPE": "recipe.yaml", "HF": "hf", "OTHER": "other"}
    for name, file in names.items():
        arguments = [argument.replace(name, str(place / file)) for argument in arguments]
    assert_one_line_error(run_tool("inspect_data", *arguments), *needles)


def test_document_statistics_count_every_document_and_token(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.concatenate((rng.integers(0, 3000, 500), [0, 127, 128, 255, 256, 70000])).astype(np.int32)
    found = lengths_of(lengths)
    assert (found.documents, found.tokens, found.longest) == (506, int(lengths.sum()), 70000)
    assert sum(each.documents for each in found.bins) == 506
    for each in found.bins:
        inside = [n for n in lengths.tolist() if each.least <= n < each.below]
        assert (each.documents, each.tokens) == (len(inside), sum(inside))
    assert [each.least for each in found.bins[:3]] == [0, 128, 256]
    assert at_least(lengths, 70000) == (1, 70000 / lengths.sum())
    assert lengths_of(np.array([], dtype=np.int32)).documents == 0


def test_the_verdict_on_document_lengths_depends_on_the_method():
    short, long = np.full(100, 900, dtype=np.int32), np.full(3, 70000, dtype=np.int32)
    for method in ("end_prompt", "end_prompt_random", "short"):
        assert verdict(method, 8192, 65536, "cross", [short], [1.0])[0]
    enough, words = verdict("full", 65536, 65536, "cross", [short, long], [0.7, 0.3])
    assert (enough, "30.0% of the tokens are in documents of at least 65,536" in words) == (False, True)
    assert verdict("full", 65536, 65536, "cross", [short, long], [0.4, 0.6])[0]
    assert not verdict("pose", 8192, 65536, "cross", [short], [1.0])[0]
    assert verdict("pose", 8192, 65536, "within", [long], [1.0])[0]
    assert [percent(share) for share in (0.0, 0.0004, 0.5, 0.9999, 1.0)] == [
        *("0.0%", "less than 0.1%", "50.0%", "over 99.9%", "100.0%"),
    ]


def test_preflight_says_when_documents_are_short_for_the_method(place):
    from endprompt_megatron.model.shape import read_shape
    from endprompt_megatron.preflight.datasets import datasets
    from endprompt_megatron.preflight.table import OK, WARN

    def found(*overrides: str) -> dict:
        recipe = load_recipe(place / "recipe.yaml", overrides)
        return {finding.check: finding for finding in datasets(recipe, read_shape(place / "hf"))}

    assert "long documents" not in found()
    only_short = f"data.train={place / 'other'}"
    full = found("context.method=full", "context.physical=256", "context.target=256", only_short)
    assert full["long documents"].verdict == WARN
    assert "method that needs none (end_prompt)" in full["long documents"].found
    within = ["data.document_ends=within", "context.physical=512", f"data.train={place / 'prefix'}"]
    full = found("context.method=full", *within)
    assert full["long documents"].verdict == OK
    epochs = float(full["data.train"].found.split(" epochs")[0].split("; ")[-1])
    dataset, _ = datasets_of(load_recipe(place / "recipe.yaml", ["context.method=full", *within]), "r", 320, None)
    assert epochs == pytest.approx(24 / dataset.windows.count, abs=0.005)


def test_empty_documents_are_in_no_window(tmp_path):
    write_dataset(tmp_path / "corpus", lengths=(0, 5, 0, 0, 30, 0))
    from endprompt_megatron.data.indexed import read_idx
    from endprompt_megatron.data.samples.windows import Windows

    windows = Windows(read_idx(tmp_path / "corpus"), 7, 3)
    for place in range(windows.count):
        for start, stop in windows.spans(place):
            number, first, length = windows.document(start)
            assert (first, length) == {1: (0, 5), 4: (5, 30)}[number]
            assert first <= start < stop <= first + length


def test_inspect_data_shows_what_recall_prompts_recall(place, tmp_path):
    keys = ["context.recall={tokens: 30, key: 6, cue: 'Again:'}", f"data.train={place / 'prefix'}"]
    recipe = load_recipe(place / "recipe.yaml", keys)
    dataset, _ = datasets_of(recipe, "recipe", 320, None)
    tokenizer = load_tokenizer(place / "hf")
    said, tokens = describe(dataset, 1, tokenizer), dataset[1]["tokens"].tolist()
    prompt = said["segments"][1]
    [start] = said["recalled"]
    assert tokens[start : start + 30] == tokens[128 - 30 :]
    assert prompt["text"].startswith("Again:")
    assert tokenizer.decode(tokens[start + 10 : start + 30])[-8:] in prompt["text"]
    assert said["loss_weights"][-3:] == [(97, 103, 0.0), (103, 127, 0.25), (127, 128, 0.0)]
    done = run_tool("inspect_data", place / "recipe.yaml", *keys, "--samples", 2, "--picture", tmp_path / "rows.png")
    assert done.returncode == 0, done.stderr
    assert f"recalled: what stands in the context from {start:,} on" in done.stdout
    assert "0 for 97..102, 0.25 for 103..126, 0 for 127" in done.stdout
    assert (tmp_path / "rows.png").stat().st_size > 10_000
