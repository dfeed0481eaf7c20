"""tools/inspect_checkpoint.py says what is there, of both sides, and finds what is damaged."""

import json

import pytest
from safetensors.torch import load_file
from small import assert_one_line_error, run_tool, small_llama

from endprompt_megatron.convert.describe_checkpoint import damage_of, inspect
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron


@pytest.fixture
def place(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    small_llama(tmp_path / "hf", vocab_size=321, dtype="bfloat16", rope_parameters=rope)
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    return tmp_path


def test_inspection_counts_the_same_bytes_on_both_sides(place):
    tensors = load_file(place / "hf/model.safetensors")
    hf, megatron = inspect(place / "hf"), inspect(place / "megatron")
    assert {tensor.name: tensor.shape for tensor in hf.tensors} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {tensor.dtype for tensor in hf.tensors} == {"bf16"}
    assert {tensor.dtype for tensor in megatron.tensors} == {"bfloat16"}
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.bytes for tensor in hf.tensors) == sum(tensor.bytes for tensor in megatron.tensors) == total
    assert hf.model == megatron.model
    assert hf.model["parameters"] == f"{total // 2:,}"
    assert hf.model["rope"] == "linear, theta 10000, factor 4.0"
    assert megatron.training["written by"] == "a conversion"
    assert hf.training == {}


def test_inspection_prints_a_page_or_json(place):
    page = run_tool("inspect_checkpoint", place / "megatron", "--tensors", "--check")
    assert page.returncode == 0, page.stderr
    assert "4 of 16, 2 for keys and values" in page.stdout
    assert "4 x 128 x 64" in page.stdout  # layers x (4 + 2 + 2) heads of 16 x hidden
    assert "every file has the size and the CRC-32" in page.stdout
    found = json.loads(run_tool("inspect_checkpoint", place / "megatron/iter_0000000", "--json").stdout)
    assert found["training"]["step"] == 0
    assert found["files"]["__0_0.distcp"] == (place / "megatron/iter_0000000/__0_0.distcp").stat().st_size


def test_inspection_names_every_kind_of_damage(place):
    directory = place / "megatron/iter_0000000"
    contents = inspect(directory)
    assert damage_of(contents) == []
    data = bytearray((directory / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "__0_0.distcp").write_bytes(data)
    (directory / "hf/tokenizer.json").unlink()
    (directory / "common.pt").write_bytes(b"")
    said = run_tool("inspect_checkpoint", directory, "--check")
    assert_one_line_error(
        said, "__0_0.distcp does not have the CRC-32", "hf/tokenizer.json is missing", "common.pt has 0"
    )


@pytest.mark.parametrize(("path", "needle"), [("nowhere", "no such directory"), (".", "holds no complete checkpoint")])
def test_inspection_of_no_checkpoint_is_one_line(place, path, needle):
    assert_one_line_error(run_tool("inspect_checkpoint", place / path), needle)
