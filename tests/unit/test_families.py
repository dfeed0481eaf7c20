"""A model family is one entry of FAMILIES: those that are there mean what transformers means, and another is enough."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROOT

from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.generated_tables import with_table
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.describe_checkpoint import inspect
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.convert.verify import verify
from endprompt_megatron.model.families import FAMILIES, LLAMA_DEFAULTS, LLAMA_ROWS, Family, Row
from endprompt_megatron.model.family_table import MODULE, family_table
from endprompt_megatron.model.published_shapes import published_config
from endprompt_megatron.model.shape import read_shape, shape_of

REQUIRED = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 320,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_left_out_mean_what_the_familys_transformers_class_means(family):
    from transformers import AutoConfig

    given = REQUIRED | {"head_dim": 2, "sliding_window": None}
    shape = shape_of(given | {"model_type": family}, "config.json")
    config = AutoConfig.for_model(family, **given)
    assert shape.num_kv_heads == config.num_key_value_heads
    assert shape.window == config.max_position_embeddings
    assert shape.norm_epsilon == config.rms_norm_eps
    assert shape.tied_embeddings == config.tie_word_embeddings
    assert shape.rope.theta == config.rope_parameters["rope_theta"]
    assert shape.rope.type == config.rope_parameters["rope_type"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biased", [False, True])
def test_biases_are_those_of_the_familys_transformers_class(family, biased):
    """Also where a config sets keys that the class does not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = REQUIRED | {"attention_bias": biased, "mlp_bias": biased, "sliding_window": None, "num_key_value_heads": 2}
    shape = shape_of(given | {"model_type": family}, "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given))
    assert {name for name in model.state_dict() if name.endswith(".bias")} == {
        name for mapped in mapping.mapped_tensors(shape) for name, _ in mapped.hf if name.endswith(".bias")
    }


def test_a_sliding_window_left_out_of_a_mistral_config_is_the_one_of_its_class():
    with pytest.raises(InputError, match="sliding_window=4096 is in use"):
        shape_of(REQUIRED | {"model_type": "mistral"}, "config.json")


def test_the_documentation_lists_every_family():
    page = (ROOT / "docs/conversion.md").read_text()
    assert with_table(page, MODULE, family_table()) == page, f"write it with python -m {MODULE} docs/conversion.md"


# A family from outside of the package: other names of weights, other defaults, biases by a key of its own.
NAMES = {
    "model.layers.{}.": "transformer.h.{}.",
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "self_attn.": "attn.",
    "lm_head": "head",
}


def renamed(name: str) -> str:
    for llama, toy in NAMES.items():
        name = name.replace(llama, toy)
    return name


TOY = Family(
    model_type="toy",
    models="Toy-1B",
    defaults={**LLAMA_DEFAULTS, "num_key_value_heads": 2, "rope_theta": 500000.0},
    rows=tuple(
        Row(row.megatron, {renamed(name): sizes for name, sizes in row.hf.items()}, row.per_group, row.only_if)
        for row in LLAMA_ROWS
    ),
    qkv_bias=True,
    proj_bias="use_output_bias",
    published={"toy-1b": REQUIRED | {"hidden_size": 128}},
)
CONFIG = REQUIRED | {"model_type": "toy", "num_attention_heads": 4}


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Path:
    """The family added to the table, and a model of it with random weights."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(CONFIG | {"use_output_bias": True}))
    names = {name: sizes for mapped in mapping.mapped_tensors(read_shape(hf)) for name, sizes in mapped.hf}
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(sizes, generator=generator).bfloat16() for name, sizes in names.items()}
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    return hf


def test_a_family_from_outside_converts_there_and_back_to_the_bit(toy, tmp_path):
    convert_hf_to_megatron(toy, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert (toy / "model.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()
    assert verify(toy, tmp_path / "megatron", to_hf=False).tensors == 3 * 13 + 3

    weights = load_file(toy / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "megatron/iter_0000000")
    proj = checkpoint.read("decoder.layers.self_attention.linear_proj.bias", (0, 0), (3, 64), torch.bfloat16)
    assert torch.equal(proj[2], weights["transformer.h.2.attn.o_proj.bias"])
    assert "decoder.layers.mlp.linear_fc1.bias" not in checkpoint.tensors


def test_a_family_from_outside_is_read_by_its_own_defaults(toy):
    shape = read_shape(toy)
    assert (shape.family, shape.num_kv_heads, shape.rope.theta) == ("toy", 2, 500000.0)
    assert (shape.qkv_bias, shape.proj_bias, shape.mlp_bias) == (True, True, False)
    assert not shape_of(CONFIG, "config.json").proj_bias
    assert shape_of(published_config("Toy-1B"), "Toy-1B").hidden_size == 128
    assert inspect(toy).model["family"] == "toy"


def test_messages_and_the_documentations_table_name_a_family_from_outside(toy):
    with pytest.raises(InputError, match=r"model_type=gpt2 is not supported; .*; toy \(Toy-1B\)"):
        shape_of(CONFIG | {"model_type": "gpt2"}, "config.json")
    assert "| `toy` | Toy-1B | on q, k, v; on o with `use_output_bias` |" in family_table()


def test_a_missing_weight_of_a_family_from_outside_is_called_by_its_own_name(toy, tmp_path):
    weights = load_file(toy / "model.safetensors")
    del weights["transformer.h.1.attn.v_proj.weight"]
    save_file(weights, toy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"a tensor is missing: transformer\.h\.1\.attn\.v_proj\.weight"):
        convert_hf_to_megatron(toy, tmp_path / "megatron")
