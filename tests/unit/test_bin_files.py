"""Weights in pytorch_model.bin: the same bytes come out as from safetensors, and a pickle's code never runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import assert_one_line_error, run_tool, small_llama

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Model, Recipe
from endprompt_megatron.convert.hf_weights import HfWeights
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.convert.verify import verify
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.preflight.model_files import hf_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return small_llama(tmp_path_factory.mktemp("bin") / "hf", vocab_size=321, dtype="bfloat16", tokenizer=False)


def as_bin(original: Path, out: Path, files: int = 1) -> Path:
    """The same model with its weights in one or several .bin files."""
    shutil.copytree(original, out)
    tensors = list(load_file(out / "model.safetensors").items())
    (out / "model.safetensors").unlink()
    if files == 1:
        torch.save(dict(tensors), out / "pytorch_model.bin")
        return out
    weight_map = {}
    for number in range(files):
        name = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        part = dict(tensors[number::files])
        torch.save(part, out / name)
        weight_map |= dict.fromkeys(part, name)
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def data_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("iter_0000000/*") if path.is_file()}


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_bin_files_convert_to_the_same_bytes_as_safetensors(original, tmp_path, files, workers):
    convert_hf_to_megatron(original, tmp_path / "expected/m")
    hf = as_bin(original, tmp_path / "hf", files)
    convert_hf_to_megatron(hf, tmp_path / "found/m", workers=workers)
    assert data_files(tmp_path / "found/m") == data_files(tmp_path / "expected/m")
    assert verify(hf, tmp_path / "found/m", to_hf=False).tensors == 39


def test_a_slice_of_a_bin_tensor_of_any_strides_is_read(tmp_path, original):
    hf = as_bin(original, tmp_path / "hf")
    value = torch.arange(12.0).reshape(3, 4)
    torch.save({"turned": value.t(), "half": torch.arange(24.0)[12:].reshape(3, 4)}, hf / "pytorch_model.bin")
    weights = HfWeights(hf)
    assert torch.equal(weights.read_slice("turned", (slice(1, 3), slice(0, 2))), value.t()[1:3, :2])
    assert torch.equal(weights.get("half"), value + 12)


def test_safetensors_are_preferred_to_bin_files(original, tmp_path):
    hf = as_bin(original, tmp_path / "hf")
    shutil.copy(original / "model.safetensors", hf)
    assert {held.file_name for held in HfWeights(hf).tensors.values()} == {"model.safetensors"}


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def damage(kind: str, hf: Path) -> None:
    path = hf / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    if kind == "code":
        torch.save({**tensors, "x": Evil(hf / "ran")}, path)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "old-format":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    elif kind == "no-dictionary":
        torch.save(tensors["model.norm.weight"], path)
    elif kind == "no-tensor":
        torch.save({**tensors, "step": 3}, path)
    elif kind == "quantised":
        torch.save({**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, path)
    elif kind == "missing":
        torch.save({name: value for name, value in tensors.items() if name != "model.norm.weight"}, path)


REFUSED = {
    "code": ["pytorch_model.bin", "refused", "safetensors"],
    "truncated": ["pytorch_model.bin", "truncated"],
    "empty": ["pytorch_model.bin", "truncated"],
    "old-format": ["pytorch_model.bin", "torch 1.6"],
    "no-dictionary": ["pytorch_model.bin", "one Tensor"],
    "no-tensor": ["pytorch_model.bin", "step is a int"],
    "quantised": ["pytorch_model.bin", "lm_head.weight", "int8", "quantised"],
    "missing": ["a tensor is missing: model.norm.weight"],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_bin_files_are_refused_before_anything_is_written(original, tmp_path, kind):
    hf = as_bin(original, tmp_path / "hf")
    damage(kind, hf)
    with pytest.raises(InputError) as refused:
        convert_hf_to_megatron(hf, tmp_path / "out")
    for needle in REFUSED[kind]:
        assert needle in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (hf / "ran").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_bin_file_with_code_is_refused_in_one_line(original, tmp_path):
    hf = as_bin(original, tmp_path / "hf")
    damage("code", hf)
    assert_one_line_error(run_tool("convert_hf_to_megatron", "--hf", hf, "--out", tmp_path / "out"), "refused")


@pytest.mark.parametrize("files", [1, 3])
def test_preflight_reads_bin_files_too(original, tmp_path, files):
    hf = as_bin(original, tmp_path / "hf", files)
    found = hf_checkpoint(Recipe(model=Model(hf=str(hf))), read_shape(hf))
    assert f"{files} file" in found.found
    assert "39 tensors" in found.found
