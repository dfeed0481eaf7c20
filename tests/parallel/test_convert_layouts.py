"""Megatron's own model loads what the converter wrote, in every layout, and what it saves exports to the same bits."""

import shutil

import numpy as np
import pytest
import torch
from float64 import Float64
from pairwise import first_of_each
from parallel.reference import EXACT
from parallel.reloading import LAYOUTS, reload
from safetensors.torch import load_file
from small import small_llama

from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

MODELS = {
    "untied": {"vocab_size": 321, "head_dim": 24},
    "tied-mha": {"vocab_size": 321, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "normed-heads": {"model_type": "qwen3", "head_dim": 24},
    "biased": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize(("model", "layout"), first_of_each(MODELS, reversed(LAYOUTS)))
def test_megatrons_model_loads_and_saves_a_converted_checkpoint(tmp_path, ranks, model, layout):
    hf = small_llama(tmp_path / "hf", **MODELS[model])
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    source, saved = tmp_path / "megatron/iter_0000000", tmp_path / "reloaded/iter_0000012"
    tensor, pipeline, _ = LAYOUTS[layout]
    answer = ranks.run(tensor * pipeline, reload, source, hf, saved, LAYOUTS[layout])[0]

    shutil.copytree(source / "hf", saved / "hf")
    shutil.copy(source / "endprompt.json", saved)
    convert_megatron_to_hf(tmp_path / "reloaded", tmp_path / "back")
    source_weights, exported = (load_file(place / "model.safetensors") for place in (hf, tmp_path / "back"))
    assert source_weights.keys() == exported.keys()
    for name, weight in source_weights.items():
        assert torch.equal(weight, exported[name]), name

    if answer:
        from transformers import AutoModelForCausalLM

        tokens, logits = torch.from_numpy(answer[0]), answer[1]
        reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        with torch.no_grad(), Float64():
            expected = reference.double()(tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=EXACT, atol=EXACT)
