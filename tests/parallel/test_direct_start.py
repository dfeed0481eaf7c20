"""A rank that reads Hugging Face's files itself holds what it holds after a conversion, in every layout."""

import numpy as np
import pytest
from pairwise import first_of_each
from parallel.cases import recipe_for, weights_held
from small import small_llama

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

LAYOUTS = {
    "one-rank": (1, ()),
    "tp2-sp": (2, ("parallel.tensor=2",)),
    "tp2-pp2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "pp2-virtual": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "pp4": (4, ("parallel.pipeline=4",)),
    "dp2-cp2": (4, ("parallel.context=2",)),
}
MODELS = {
    "untied-sharded": {"vocab_size": 321, "head_dim": 24},
    "tied-mha-bf16": {
        "vocab_size": 321,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "dtype": "bfloat16",
    },
    "normed-heads": {"model_type": "qwen3", "head_dim": 24},
    "biased-sharded": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize(("model", "layout"), first_of_each(MODELS, reversed(LAYOUTS)))
def test_a_direct_start_loads_the_weights_of_a_converted_checkpoint(tmp_path, ranks, model, layout):
    hf = small_llama(tmp_path / "hf", **MODELS[model])
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    if "sharded" in model:
        reshard(hf)
    count, keys = LAYOUTS[layout]
    keys = ("precision.dtype=bfloat16", *keys)
    converted = ranks.run(count, weights_held, recipe_for(tmp_path, hf, tmp_path / "megatron", *keys))
    direct = ranks.run(count, weights_held, recipe_for(tmp_path, hf, hf, f"model.init_from={hf}", *keys))
    for rank, (expected, found) in enumerate(zip(converted, direct, strict=True)):
        assert expected.keys() == found.keys()
        assert any(np.abs(value).max() > 0 for value in found.values())
        for name, value in expected.items():
            np.testing.assert_array_equal(value, found[name], err_msg=f"rank {rank}: {name}")


def reshard(hf) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf)
    (hf / "model.safetensors").unlink()
    model.save_pretrained(hf, max_shard_size="100KB")
    assert len(list(hf.glob("model-*.safetensors"))) > 3
