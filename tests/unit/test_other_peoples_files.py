"""Directories and numbers as other people have them: read where nothing is lost, named for what they are where not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import edit_json, small_llama

from endprompt_megatron.checkpoint.layout import find_checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.convert import verify
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.data.corpus.inputs import sources_of
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.tokenizer import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 13\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return small_llama(tmp_path_factory.mktemp("original") / "hf", num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture
def hf(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "hf"))


def weights_after(hf: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What the directory's weights are after a conversion there and back."""
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    return load_file(tmp_path / "back/model.safetensors")


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def in_shards(hf: Path, ending: str) -> None:
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:7], names[7:14], names[14:]), start=1):
        values = {name: tensors[name] for name in part}
        if ending == "safetensors":
            save_file(values, hf / f"model-{number:05d}-of-00003.safetensors", {"format": "pt"})
        else:
            torch.save(values, hf / f"pytorch_model-{number:05d}-of-00003.bin")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_without_an_index_are_read_if_all_are_there(hf, original, tmp_path, ending):
    in_shards(hf, ending)
    assert_same(weights_after(hf, tmp_path), load_file(original / "model.safetensors"))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_without_an_index_of_which_one_is_missing_are_refused_by_its_name(hf, tmp_path, ending):
    in_shards(hf, ending)
    begin = "model" if ending == "safetensors" else "pytorch_model"
    (hf / f"{begin}-00002-of-00003.{ending}").unlink()
    with pytest.raises(InputError, match=f"2 of 3 shards and no index; missing are {begin}-00002-of-00003.{ending}"):
        convert_hf_to_megatron(hf, tmp_path / "megatron")


def test_an_index_beside_a_whole_file_is_not_needed_as_in_transformers(hf, original, tmp_path):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(weights_after(hf, tmp_path), load_file(original / "model.safetensors"))


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.masked_bias",
    "rope.freqs",
]


@pytest.mark.parametrize("buffer", BUFFERS)
def test_buffers_that_older_classes_saved_are_left_out(hf, original, tmp_path, buffer):
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {buffer: torch.zeros(1, 1, 4, 8)}, hf / "model.safetensors", {"format": "pt"})
    assert_same(weights_after(hf, tmp_path), load_file(original / "model.safetensors"))


def emptied(hf: Path) -> Path:
    for path in hf.iterdir():
        path.unlink()
    return hf


def released(hf: Path) -> None:
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        (emptied(hf) if name == "consolidated.00.pth" else hf).joinpath(name).write_text("{}")


def adapter(hf: Path) -> None:
    emptied(hf)
    (hf / "adapter_config.json").write_text("{}")
    (hf / "adapter_model.safetensors").write_text("")


def adapter_with_config(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "adapter_config.json").write_text("{}")


def pointer(name: str):
    return lambda hf: (hf / name).write_text(POINTER)


SOMETHING_ELSE = {
    "released": (released, "holds the weights as their authors release them (consolidated.00.pth)"),
    "adapter": (adapter, "holds a LoRA adapter without its base model"),
    "adapter-with-config": (adapter_with_config, "holds a LoRA adapter without its base model"),
    "run": (lambda hf: (emptied(hf) / "checkpoints").mkdir(), "holds Megatron-Core checkpoints"),
    "pointer-weights": (pointer("model.safetensors"), "model.safetensors: a pointer of Git LFS"),
    "pointer-config": (pointer("config.json"), "config.json: a pointer of Git LFS"),
    "pointer-tokenizer": (pointer("tokenizer.json"), "tokenizer.json: a pointer of Git LFS"),
}


@pytest.mark.parametrize("case", SOMETHING_ELSE)
def test_what_is_no_model_is_named_for_what_it_is(hf, tmp_path, case):
    change, message = SOMETHING_ELSE[case]
    change(hf)
    with pytest.raises(InputError) as refused:
        convert_hf_to_megatron(hf, tmp_path / "megatron")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*megatron*"))


def test_pointers_of_tokenizers_and_texts_are_named(hf, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model"):
        place = tmp_path / name.replace(".", "-")
        place.mkdir()
        (place / name).write_text(POINTER)
        with pytest.raises(InputError, match=f"{name}: a pointer of Git LFS"):
            load_tokenizer(place)
    (tmp_path / "a.jsonl").write_text(POINTER)
    with pytest.raises(InputError, match=r"a.jsonl: a pointer of Git LFS"):
        sources_of([str(tmp_path / "a.jsonl")], None, "text")


def test_a_fault_of_config_json_is_not_the_tokenizers(hf):
    """transformers reads config.json to find a tokenizer's class."""
    edit_json(hf / "config.json", rope_parameters={"rope_type": "linear", "factor": None, "rope_theta": "x"})
    assert load_tokenizer(hf).eos_id == 1
    (hf / "config.json").write_text("{")
    (hf / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: cannot be read as a Hugging Face config"):
        _ = load_tokenizer(hf).eos_id


@pytest.mark.parametrize("act", ["silu", "swish"])
def test_swish_is_silu(hf, act):
    edit_json(hf / "config.json", hidden_act=act)
    assert read_shape(hf).num_layers == 2


def test_a_run_is_found_by_its_directory(hf, tmp_path):
    convert_hf_to_megatron(hf, tmp_path / "run/checkpoints")
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(tmp_path / "run/checkpoints")
    assert find_checkpoint(tmp_path / "run", 0).name == "iter_0000000"
    with pytest.raises(InputError, match="holds no complete checkpoint, but a Hugging Face model"):
        find_checkpoint(hf)


@pytest.mark.parametrize("tokens", ["1e6", "1.0e6", "1E+6", "1_000_000", "1000000", "1000000.0"])
def test_whole_numbers_are_taken_as_people_write_them(tmp_path, tokens):
    recipe = "model: {hf: x}\ncontext: {physical: 1_000}\ndata: {train: x}\ntrain: {%s}\ncheckpoint: {dir: run}\n"
    (tmp_path / "given.yaml").write_text(recipe % f"tokens: {tokens}, global_batch_size: 10")
    (tmp_path / "over.yaml").write_text(recipe % "steps: 5, global_batch_size: 10")
    assert load_recipe(tmp_path / "given.yaml").train.tokens == 1_000_000
    found = load_recipe(tmp_path / "over.yaml", [f"train.tokens={tokens}"])
    assert (found.train.tokens, found.train.steps) == (1_000_000, 100)


@pytest.mark.parametrize("tokens", ["1.5", "1e-3", "1e3x", "1.0e0.5"])
def test_numbers_that_are_not_whole_are_refused(tmp_path, tokens):
    (tmp_path / "recipe.yaml").write_text("model: {hf: x}\ntrain: {steps: 5}\ncheckpoint: {dir: run}\n")
    with pytest.raises(InputError, match=r"train.tokens"):
        load_recipe(tmp_path / "recipe.yaml", [f"train.tokens={tokens}"])


# Casts

NAME = "model.layers.1.mlp.down_proj.weight"


def with_value(hf: Path, value: float, name: str = NAME) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [70000.0, -1e30])
@pytest.mark.parametrize("name", [NAME, "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_cast_that_overflows_is_refused_with_the_tensors_name(hf, tmp_path, value, name):
    with_value(hf, value, name)
    with pytest.raises(InputError) as refused:
        convert_hf_to_megatron(hf, tmp_path / "half", "float16")
    assert f"{name}: {abs(value):g} does not fit float16, whose largest number is 65504" in str(refused.value)
    assert not list(tmp_path.glob("*half*"))
    convert_hf_to_megatron(hf, tmp_path / "whole")
    with pytest.raises(InputError, match=r"does not fit float16, whose largest number is 65504"):
        convert_megatron_to_hf(tmp_path / "whole", tmp_path / "back", dtype="float16")
    assert not list(tmp_path.glob("*back*"))
    convert_hf_to_megatron(hf, tmp_path / "wide", "bfloat16")


def test_numbers_that_are_infinite_in_the_source_stay(hf, tmp_path):
    with_value(hf, float("inf"))
    convert_hf_to_megatron(hf, tmp_path / "half", "float16")
    assert verify.verify(hf, tmp_path / "half", to_hf=False).cast == "float16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_verify_compares_a_cast_with_its_source(hf, tmp_path, dtype):
    convert_hf_to_megatron(hf, tmp_path / "whole")
    convert_megatron_to_hf(tmp_path / "whole", tmp_path / "back", dtype=dtype)
    assert "rounded to " + dtype in str(verify.verify(tmp_path / "back", tmp_path / "whole", to_hf=True))
    tensors = load_file(tmp_path / "back/model.safetensors")
    # The next number, which the same cast on both sides would show, and one that a cast to infinity would hide.
    for value in (float(tensors[NAME].view(-1)[5]) * (1 + 2 * torch.finfo(getattr(torch, dtype)).eps), float("inf")):
        with_value(tmp_path / "back", value)
        with pytest.raises(InputError, match=rf"{NAME} has 1 numbers that are not its source's, rounded to {dtype}"):
            verify.verify(tmp_path / "back", tmp_path / "whole", to_hf=True)
