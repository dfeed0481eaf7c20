"""--verify finds a single wrong element, in any tensor of either side, and names it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import assert_one_line_error, run_tool, small_llama

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert import verify
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.families import LLAMA_ROWS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("verify")
    small_llama(place / "hf", vocab_size=321, head_dim=24, attention_bias=True, mlp_bias=True)
    convert_hf_to_megatron(place / "hf", place / "megatron")
    return place


@pytest.mark.parametrize("workers", [1, 2])
def test_equal_weights_are_verified(place, monkeypatch, workers):
    monkeypatch.setattr(verify, "_BLOCK", 2048)
    done = verify.verify(place / "hf", place / "megatron", to_hf=False, workers=workers)
    tensors = load_file(place / "hf/model.safetensors")
    assert (done.tensors, done.bytes) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


@pytest.mark.parametrize("row", [row for row in LLAMA_ROWS if row.only_if != "qk_norm"], ids=lambda row: row.megatron)
def test_verify_names_the_tensor_with_one_changed_element(place, tmp_path, row):
    tensors = load_file(place / "hf/model.safetensors")
    name = list(row.hf)[-1].format(2)
    value = tensors[name].flatten()
    value[-1] += 1e-3 * (1 + value[-1].abs())
    tensors[name] = value.reshape(tensors[name].shape)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((place / "hf/config.json").read_bytes())
    with pytest.raises(InputError, match=rf"differ: {name} has CRC-32 [0-9a-f]{{8}} in Hugging Face's") as error:
        verify.verify(tmp_path, place / "megatron", to_hf=False)
    assert str(error.value).count("CRC-32") == 1  # and no other tensor


def test_verify_finds_heads_in_another_order(place, tmp_path):
    """What a wrong map would do: the same numbers in other places."""
    tensors = load_file(place / "hf/model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = torch.cat([tensors[name][24:48], tensors[name][:24], tensors[name][48:]])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((place / "hf/config.json").read_bytes())
    with pytest.raises(InputError, match=name):
        verify.verify(tmp_path, place / "megatron", to_hf=False)


def test_verify_compares_casts_as_they_were_made(place, tmp_path):
    convert_hf_to_megatron(place / "hf", tmp_path / "narrow", "bfloat16")
    verify.verify(place / "hf", tmp_path / "narrow", to_hf=False)
    convert_megatron_to_hf(place / "megatron", tmp_path / "half", dtype="float16")
    verify.verify(tmp_path / "half", place / "megatron", to_hf=True)
    with pytest.raises(InputError, match="differ"):
        verify.verify(tmp_path / "half", place / "megatron", to_hf=False)


@pytest.mark.full
def test_conversion_tools_verify_after_converting_and_what_is_there_already(place, tmp_path):
    run = run_tool("convert_hf_to_megatron", "--hf", place / "hf", "--out", tmp_path / "out", "--verify")
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["wrote", "verified"]
    before = (tmp_path / "out/iter_0000000/.metadata").stat().st_mtime_ns
    run = run_tool("convert_hf_to_megatron", "--hf", place / "hf", "--out", tmp_path / "out", "--verify")
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["verified"]
    assert (tmp_path / "out/iter_0000000/.metadata").stat().st_mtime_ns == before

    to_hf = ("convert_megatron_to_hf", "--megatron", tmp_path / "out", "--out", tmp_path / "back", "--verify")
    run = run_tool(*to_hf)
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["wrote", "verified"], run.stderr
    data = bytearray((tmp_path / "back/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "back/model.safetensors").write_bytes(data)
    assert_one_line_error(run_tool(*to_hf), "differ", "convert again")
