"""Preflight of the model, the checkpoint and the data: each thing that can be wrong with them is made wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small import edit_json, small_llama
from unit.starting import PREFLIGHT_CHECKS

from endprompt_megatron.data.indexed import write_idx
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN


def shards(place: Path) -> None:
    """The model again, in several shards."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "hf")
    (place / "hf/model.safetensors").unlink()
    model.save_pretrained(place / "hf", max_shard_size="200KB")
    assert len(list((place / "hf").glob("model-*.safetensors"))) > 2


def without_a_shard(place: Path) -> None:
    shards(place)
    next((place / "hf").glob("model-00002-*")).unlink()


def with_a_cut_shard(place: Path) -> None:
    shards(place)
    cut(next((place / "hf").glob("model-00003-*")), 100)


def with_an_index_that_errs(place: Path) -> None:
    shards(place)
    index = place / "hf/model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = value["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(value))


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def edit_idx(place: Path, offset: int, value: int) -> None:
    path = place / "train.idx"
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = value.to_bytes(8, "little")
    path.write_bytes(content)


def other_tokenizer(place: Path) -> None:
    (place / "train.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))


def larger_tokenizer(place: Path) -> None:
    value = json.loads((place / "hf/tokenizer.json").read_text())
    value["added_tokens"][-1]["id"] = 900
    (place / "hf/tokenizer.json").write_text(json.dumps(value))


def of_three_layers(place: Path) -> None:
    edit_json(place / "megatron/iter_0000000/hf/config.json", num_hidden_layers=3)


CONVERTED = "megatron/iter_0000000"


# name: (overrides, damage, check, verdict, expected texts)
WRONG = {
    "missing-shard": ([], without_a_shard, "HF checkpoint", FAIL, ["1 of ", "shards missing: model-00002"]),
    "cut-shard": ([], with_a_cut_shard, "HF checkpoint", FAIL, ["1 damaged: model-00003", "header says"]),
    "cut-header": (
        [],
        lambda p: (p / "hf/model.safetensors").write_bytes(b"\x00\x10\x00\x00\x00\x00\x00\x00{"),
        "HF checkpoint",
        FAIL,
        ["model.safetensors (cut short at 9 bytes)"],
    ),
    "wrong-index": ([], with_an_index_that_errs, "HF checkpoint", FAIL, ["model.norm.weight is in model-00001"]),
    "no-weights-but-converted": (
        [],
        lambda p: (p / "hf/model.safetensors").unlink(),
        "HF checkpoint",
        WARN,
        ["converted already"],
    ),
    "no-weights-at-all": (
        ["model.init_from=nowhere"],
        lambda p: (p / "hf/model.safetensors").unlink(),
        "HF checkpoint",
        FAIL,
        ["hf: no model.safetensors"],
    ),
    "other-shape": (
        [],
        lambda p: edit_json(p / "hf/config.json", intermediate_size=128),
        "HF checkpoint",
        FAIL,
        ["mlp.down_proj.weight has shape [64, 112]; config.json says [64, 128]"],
    ),
    "more-layers": (
        [],
        lambda p: edit_json(p / "hf/config.json", num_hidden_layers=5),
        "HF checkpoint",
        FAIL,
        ["9 tensors are missing: model.layers.4"],
    ),
    "not-converted-yet": (
        ["model.init_from=nowhere"],
        lambda p: None,
        "converted checkpoint",
        WARN,
        ["nowhere does not exist yet", "convert_hf_to_megatron.py --hf hf --out nowhere"],
    ),
    "not-to-be-converted": (
        ["model.init_from=hf"],
        lambda p: None,
        "converted checkpoint",
        OK,
        ["reads its own shards of hf"],
    ),
    "not-to-be-converted-and-cut": (
        ["model.init_from=hf"],
        with_a_cut_shard,
        "converted checkpoint",
        FAIL,
        ["1 damaged: model-00003"],
    ),
    "nothing-to-start-from": (
        ["model.init_from=null"],
        lambda p: None,
        "converted checkpoint",
        FAIL,
        ["model.init_from is missing"],
    ),
    "half-converted": (
        [],
        lambda p: (p / CONVERTED / "endprompt.json").unlink(),
        "converted checkpoint",
        FAIL,
        ["megatron: holds no complete checkpoint"],
    ),
    "converted-cut": (
        [],
        lambda p: cut(p / CONVERTED / "__0_0.distcp", 1000),
        "converted checkpoint",
        FAIL,
        ["__0_0.distcp has", "damaged"],
    ),
    "converted-file-missing": (
        [],
        lambda p: (p / CONVERTED / "__0_0.distcp").unlink(),
        "converted checkpoint",
        FAIL,
        ["__0_0.distcp is missing"],
    ),
    "converted-metadata-cut": (
        [],
        lambda p: cut(p / CONVERTED / ".metadata", 50),
        "converted checkpoint",
        FAIL,
        [".metadata has ", "convert it again"],
    ),
    "converted-from-another": (
        [],
        of_three_layers,
        "converted checkpoint",
        FAIL,
        ["another model: num_layers=3, model.hf has 4"],
    ),
    "tokenizer-of-another": ([], larger_tokenizer, "tokenizer", FAIL, ["token id 900", "vocab_size=320"]),
    "no-tokenizer": (
        [],
        lambda p: [path.unlink() for path in (p / "hf").glob("tokenizer*")],
        "tokenizer",
        FAIL,
        ["holds no tokenizer"],
    ),
    "prompt-fills-the-sequence": (["context.physical=32"], lambda p: None, "tokenizer", FAIL, ["leaves no context"]),
    "data-of-another": (
        ["data.train=foreign"],
        lambda p: None,
        "data",
        FAIL,
        ["foreign: token id 399", "vocabulary of 320"],
    ),
    "data-with-another-tokenizer": ([], other_tokenizer, "data", FAIL, ["train was prepared with another"]),
    "data-missing": (["data.train=nowhere"], lambda p: None, "data", FAIL, ["nowhere.idx: no such file"]),
    "bin-cut": ([], lambda p: cut(p / "train.bin", 10), "data", FAIL, ["train.bin: 7990 bytes", "expects 8000"]),
    "idx-cut": ([], lambda p: cut(p / "train.idx", 4), "data", FAIL, ["train.idx: cut short"]),
    "idx-pointer": ([], lambda p: edit_idx(p, 38, 2), "data", FAIL, ["train.idx: its pointers"]),
    "idx-documents": ([], lambda p: edit_idx(p, 54, 9), "data", FAIL, ["train.idx: its pointers"]),
    "data-short": (["data.train=short"], lambda p: None, "data", FAIL, ["20 tokens are less than one sample"]),
    "valid-of-another": (["data.valid=foreign"], lambda p: None, "data", FAIL, ["data.valid=foreign: token id 399"]),
    "data-repeats": (["train.steps=100"], lambda p: None, "data.train", WARN, ["5.00 epochs in 100 steps", "repeated"]),
    "recipe-illegal": (
        ["parallel.pipeline=3"],
        lambda p: None,
        "recipe",
        FAIL,
        ["parallel.pipeline=3", "num_hidden_layers=4"],
    ),
    "run-in-the-way": (["checkpoint.dir=file/run"], lambda p: None, "run directory", FAIL, ["cannot be written"]),
    "disk-too-small": (["checkpoint.keep=0", "train.steps=100000000"], lambda p: None, "free disk", FAIL, ["needed"]),
    "fp8-without-gpu": (["precision.fp8=hybrid"], lambda p: None, "GPUs", FAIL, ["precision.fp8=hybrid"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_preflight_names_each_fault_and_runs_every_other_check(case, place, at, monkeypatch):
    overrides, damage, check, verdict, needles = WRONG[case]
    damage(place)
    found, code = at(place, *overrides)
    assert check in found, found
    assert found[check].verdict == verdict, found[check]
    for needle in needles:
        assert needle in found[check].found, f"{needle!r} is not in: {found[check].found}"
    assert code == (2 if verdict == FAIL else 0), found
    assert set(found) | {"data", "data.train"} >= PREFLIGHT_CHECKS


def test_without_config_json_the_checks_that_need_the_shape_say_why_they_did_not_run(place, at):
    found, code = at(place, "context.original=64", "model.hf=nowhere")
    assert code == 2
    assert "nowhere" in found["HF checkpoint"].found
    assert found["HF checkpoint"].verdict == FAIL
    for check in ("tokenizer", "data", "free disk", "converted checkpoint"):
        assert (found[check].verdict, "config.json" in found[check].found) == (NOT_RUN, True)
    assert found["run directory"].verdict == OK


def test_preflight_names_the_step_a_run_resumes_from_and_refuses_another_recipe(place, at, extend):
    ran = extend(place, "recipe.yaml", "train.steps=3")
    assert ran.returncode == 0, ran.stderr
    found, code = at(place)
    assert (code, found["converted checkpoint"].verdict) == (0, OK)
    assert "resumes from step 3 of 10" in found["converted checkpoint"].found
    found, code = at(place, "context.method=pose")
    assert (code, found["converted checkpoint"].verdict) == (2, FAIL)
    assert "context.method=pose but run/checkpoints/iter_0000003 was trained with end_prompt" in (
        found["converted checkpoint"].found
    )


def test_preflight_warns_that_a_run_falls_back_from_a_damaged_checkpoint(place, at, extend):
    ran = extend(place, "recipe.yaml", "train.steps=4", "checkpoint.interval=2", "optim.warmup_steps=1")
    assert ran.returncode == 0, ran.stderr
    cut(place / "run/checkpoints/iter_0000004/__0_0.distcp", 10)
    found, code = at(place)
    assert (code, found["converted checkpoint"].verdict) == (0, WARN)
    assert "iter_0000004: __0_0.distcp has " in found["converted checkpoint"].found
    assert "falls back to step 2" in found["converted checkpoint"].found
    shutil.rmtree(place / "run/checkpoints/iter_0000002")
    found, code = at(place)
    assert (code, found["converted checkpoint"].verdict) == (2, FAIL)


def test_preflight_finds_bad_token_ids_in_a_sample_of_a_large_dataset(place, at, monkeypatch):
    """A token that no model knows, somewhere in 400 windows of which 256 are read: its run is longer than a window."""
    count = 400 * 65536
    tokens = np.full(count, 7, dtype=np.uint16)
    tokens[200 * 65536 : 203 * 65536] = 321
    tokens.tofile(place / "train.bin")
    write_idx(place / "train.idx", np.array([count]), np.dtype(np.uint16))
    found, code = at(place)
    assert (code, found["data"].verdict) == (2, FAIL)
    assert "token id 321" in found["data"].found


def test_a_tied_model_that_stores_its_embeddings_twice_is_complete(tmp_path, at, place):
    shutil.rmtree(place / "hf")
    small_llama(place / "hf", tie_word_embeddings=True)
    found, _ = at(place)
    assert found["HF checkpoint"].verdict == OK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "su", "factor": 4.0}}, "rope_parameters.rope_type=su is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "rope_scaling.factor='8' should be a positive number"),
        ({"model_type": "gpt2"}, "model_type=gpt2 is not supported"),
    ],
)
def test_preflight_has_a_row_for_a_model_that_cannot_be_read(place, at, change, message):
    edit_json(place / "hf/config.json", **change)
    found, code = at(place)
    assert code == 2
    for check in ("recipe", "HF checkpoint"):
        assert found[check].verdict == FAIL
        assert message in found[check].found
