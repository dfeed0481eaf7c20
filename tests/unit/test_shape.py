"""Shapes of known models, by their exact parameter counts, and the configs that are refused."""

import json

import pytest

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.model.shape import read_shape, shape_of

LLAMA = {"model_type": "llama", "hidden_act": "silu"}


def config(hidden, ffn, layers, heads, kv_heads, vocab, **more) -> dict:
    return LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


# What the published checkpoints count, tied embeddings once.
MODELS = {
    "LLaMA-2-7B": (config(4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "LLaMA-3-8B": (config(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "LLaMA-3-70B": (config(8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "LLaMA-3.2-1B": (config(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True), 1_235_814_400),
    "Mistral-7B-v0.3": (
        config(4096, 14336, 32, 32, 8, 32768, model_type="mistral", sliding_window=None),
        7_248_023_552,
    ),
    "LLaMA-3.2-3B": (config(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True), 3_212_749_824),
    "Qwen2.5-0.5B": (
        config(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen2.5-7B": (
        config(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", sliding_window=131072, use_sliding_window=False),
        7_615_616_512,
    ),
    "SmolLM2-135M": (config(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True), 134_515_008),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_exactly(name):
    values, parameters = MODELS[name]
    assert shape_of(values, name).parameters == parameters


def test_keys_left_out_of_llama_2s_config_mean_what_transformers_means():
    """LLaMA-2's config names neither KV heads nor head_dim nor a tie nor theta."""
    values = config(4096, 11008, 32, 32, None, 32000)
    shape = shape_of(values, "config.json")
    assert (shape.num_kv_heads, shape.head_dim, shape.tied_embeddings) == (32, 128, False)
    assert (shape.rope.theta, shape.window, shape.norm_epsilon) == (10000.0, 2048, 1e-6)


@pytest.mark.parametrize(
    "where",
    [
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 500000, "rope_scaling": None},
    ],
    ids=["transformers-4", "transformers-5", "transformers-4-scaled", "null-scaling"],
)
def test_theta_is_read_in_both_forms(where):
    assert shape_of(config(64, 112, 4, 4, 2, 320, **where), "config.json").rope.theta == 500000.0


def test_head_dim_may_differ_from_hidden_size_over_heads():
    values = config(64, 112, 4, 4, 2, 320, head_dim=32)
    assert shape_of(values, "config.json").head_dim == 32
    # q and o 64 x 128, k and v 64 x 64; gate, up, down 64 x 112; two norms
    layer = 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 112 + 2 * 64
    assert shape_of(values, "config.json").parameters == 4 * layer + 2 * 320 * 64 + 64


@pytest.mark.parametrize(("multiple", "padded"), [(1, 321), (2, 322), (3, 321), (8, 328)])
def test_vocabulary_is_padded_to_a_multiple(multiple, padded):
    assert shape_of(config(64, 112, 4, 4, 2, 321), "config.json").padded_vocab(multiple) == padded


REFUSED = {
    "family": ({"model_type": "gpt2"}, "model_type=gpt2 is not supported"),
    "no-family": ({"model_type": None}, "model_type=None"),
    "no-hidden": ({"hidden_size": None}, "hidden_size=None should be a positive integer"),
    "hidden-text": ({"hidden_size": "64"}, "hidden_size=64"),
    "no-layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "vocabulary-true": ({"vocab_size": True}, "vocab_size=True"),
    "kv-heads": ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    "kv-heads-text": ({"num_key_value_heads": "2"}, "num_key_value_heads=2 should be a positive integer"),
    "heads-do-not-divide": ({"hidden_size": 66}, "num_attention_heads=4 does not divide hidden_size=66"),
    "head-dim": ({"head_dim": 16.5}, "head_dim=16.5 should be a positive integer"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (gptq)"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts (num_local_experts=8)"),
    "layer-types": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types has sliding_attention",
    ),
    "qwen-sliding": (
        {"model_type": "qwen2", "max_position_embeddings": 8192, "sliding_window": 4096, "use_sliding_window": True},
        "Qwen2.5 has use_sliding_window=false",
    ),
    "window": ({"max_position_embeddings": None}, "max_position_embeddings=None should be a positive integer"),
    "partial-rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "epsilon": ({"rms_norm_eps": "tiny"}, "rms_norm_eps=tiny"),
    "theta": ({"rope_theta": "large"}, "rope_theta=large"),
    "scaling": ({"rope_scaling": "linear"}, "rope_scaling=linear"),
    "sliding": (
        {"model_type": "mistral", "max_position_embeddings": 8192, "sliding_window": 4096},
        "sliding_window=4096",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_config_is_refused(tmp_path, case):
    changes, line = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(config(64, 112, 4, 4, 2, 320) | changes))
    with pytest.raises(InputError) as refused:
        read_shape(tmp_path)
    assert line in str(refused.value)
    assert str(tmp_path / "config.json") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_sliding_window_that_covers_the_context_is_none():
    values = config(64, 112, 4, 4, 2, 320, model_type="mistral", max_position_embeddings=4096, sliding_window=4096)
    assert shape_of(values, "config.json").family == "mistral"
