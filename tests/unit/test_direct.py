"""Reading parts of Megatron's tensors straight out of Hugging Face files gives what the whole conversion gives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_llama

from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.direct import HfSource, weights_at
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.families import LLAMA_ROWS
from endprompt_megatron.model.shape import read_shape


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    place = tmp_path_factory.mktemp("direct")
    biased = {"attention_bias": True, "mlp_bias": True}  # every row of the table is in it
    hf = small_llama(place / "hf", vocab_size=321, head_dim=24, num_attention_heads=6, hidden_size=96, **biased)
    convert_hf_to_megatron(hf, place / "megatron")
    return HfSource(hf), Checkpoint(place / "megatron/iter_0000000")


@pytest.mark.parametrize("row", [row for row in LLAMA_ROWS if row.only_if != "qk_norm"], ids=lambda row: row.megatron)
def test_any_shard_read_from_hugging_face_equals_the_converted_one(both, row):
    direct, converted = both
    whole = converted.shape(row.megatron)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def compare_shards(data):
        begin = tuple(data.draw(st.integers(0, size - 1)) for size in whole)
        size = tuple(data.draw(st.integers(1, n - first)) for n, first in zip(whole, begin, strict=True))
        value = direct.read(row.megatron, begin, size, torch.float32)
        assert torch.equal(value, converted.read(row.megatron, begin, size, torch.float32))

    compare_shards()
    everything = direct.read(row.megatron, (0,) * len(whole), whole, torch.bfloat16)
    assert everything.numel() == math.prod(whole)
    assert everything.dtype == torch.bfloat16


def test_rows_beyond_the_vocabulary_are_read_as_zero(both):
    direct, _ = both
    rows = direct.read(mapping.OUTPUT, (200, 0), (200, 96), torch.float32, zero_outside=True).numpy()
    assert np.all(rows[121:] == 0)
    assert np.abs(rows[:121]).min(axis=1).max() > 0
    with pytest.raises(InputError, match="nothing for 7584 of 19200 elements"):
        direct.read(mapping.OUTPUT, (200, 0), (200, 96), torch.float32)


@pytest.mark.parametrize(
    ("directory", "needle"),
    [
        ("hf", None),
        ("megatron", None),
        ("megatron/iter_0000000", None),
        (".", "no complete checkpoint"),
        ("no", "no such"),
    ],
)
def test_weights_to_start_from_are_found_in_both_formats_or_refused(tmp_path, directory, needle):
    hf = small_llama(tmp_path / "hf")
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    if needle is None:
        found = weights_at(tmp_path / directory, read_shape(hf), "model.init_from")
        assert isinstance(found, HfSource if directory == "hf" else Checkpoint)
        return
    with pytest.raises(InputError, match=needle):
        weights_at(tmp_path / directory, read_shape(hf), "model.init_from")


def test_weights_of_another_model_are_refused(tmp_path):
    small, large = small_llama(tmp_path / "hf"), small_llama(tmp_path / "larger", num_hidden_layers=5)
    with pytest.raises(InputError, match=r"larger holds another model: num_layers=5, model.hf has 4"):
        weights_at(large, read_shape(small), "model.init_from")


def test_a_tensor_in_two_weight_files_is_refused(tmp_path):
    import json

    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    hf = small_llama(tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    (tmp_path / "hf/config.json").replace(tmp_path / "sharded/config.json")
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())["weight_map"]
    first, *_, last = sorted(set(index.values()))
    tensors = load_file(tmp_path / "sharded" / last)
    name, value = next(iter(load_file(tmp_path / "sharded" / first).items()))
    save_file({**tensors, name: value}, tmp_path / "sharded" / last)
    with pytest.raises(InputError, match=rf"{last}: {name} is in {first} as well"):
        HfSource(tmp_path / "sharded")
