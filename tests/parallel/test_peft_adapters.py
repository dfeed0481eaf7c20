"""LoRA's adapters in PEFT's format: out, read by PEFT itself, and in, as a start."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from float64 import Float64
from parallel.cases import recipe_for
from parallel.reference import assert_as_exact
from parallel.test_checkpoints import everything, train_and_save
from parallel.test_longlora import LAYOUTS, LORA, MLP, SHIFTED, batches_for
from small import assert_one_line_error, edit_json, run_tool

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert.peft_adapter import convert_megatron_to_peft
from endprompt_megatron.convert.peft_start import adapter_to_start_from
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.model.shape import read_shape


@pytest.fixture(scope="module")
def trained(ranks, models, tmp_path_factory):
    """Three steps with adapters, in float32."""
    root = tmp_path_factory.mktemp("adapters")
    recipe = recipe_for(*models("odd-vocab"), "parallel.tensor=2", *LORA, *SHIFTED)
    ranks.run(2, train_and_save, recipe, batches_for(recipe, 3), root)
    return root


@pytest.mark.parametrize("given", [MLP, ["longlora.train_embeddings=false", "longlora.train_norms=false"]])
def test_an_adapter_in_pefts_format_is_the_merged_model_on_the_base(ranks, models, tmp_path, given):
    """PEFT itself reads it, on the base model with the exported config."""
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = recipe_for(*models("odd-vocab"), "parallel.tensor=2", *LORA, *given)
    ranks.run(4, train_and_save, recipe, batches_for(recipe, 3), tmp_path / "run")
    done = run_tool(
        "convert_megatron_to_hf", "--megatron", tmp_path / "run", "--out", tmp_path / "adapter", "--adapter"
    )
    assert done.returncode == 0, done.stderr
    convert_megatron_to_hf(tmp_path / "run", tmp_path / "merged")
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.hf, config=config, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (1, 90)))
    with torch.no_grad():
        rounded = merged(ids).logits.numpy()
        with Float64():
            found, expected = adapted.double()(ids).logits.numpy(), merged.double()(ids).logits.numpy()
    assert_as_exact(found, rounded, expected)
    plain = AutoModelForCausalLM.from_pretrained(recipe.model.hf, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        assert np.abs(plain(ids).logits.numpy() - expected).max() > 1e-2, "the adapter changed next to nothing"


def test_an_adapter_of_a_model_without_any_is_refused(models, tmp_path):
    for options, said in (((), "holds no LoRA adapters"), (("--verify",), "--verify applies to a model")):
        megatron = models("gqa")[2]
        arguments = ("--megatron", megatron, "--out", tmp_path / "out", "--adapter", *options)
        assert_one_line_error(run_tool("convert_megatron_to_hf", *arguments), said)
    assert not list(tmp_path.iterdir())


def test_training_starts_from_an_adapter_in_pefts_format_in_every_layout(ranks, models, trained, tmp_path):
    """What is saved before a step is what the adapter's run had saved, master weights included."""
    vocab = read_shape(models("odd-vocab")[1]).vocab_size
    convert_megatron_to_peft(trained, tmp_path / "adapter", 3)
    expected = {
        key: value
        for key, value in everything(trained / "iter_0000003", vocab).items()
        if isinstance(value, torch.Tensor) and "optimizer.state.exp_avg" not in key
    }
    for layout in ("one", "tp2-pp2-sp"):
        world, keys = LAYOUTS[layout]
        start = f"longlora.init_from={tmp_path}/adapter"
        recipe = recipe_for(*models("odd-vocab"), *LORA, *SHIFTED, *keys, start)
        ranks.run(world, train_and_save, recipe, [], tmp_path / layout)
        found = everything(tmp_path / layout / "iter_0000001", vocab)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


WRONG_ADAPTERS = {
    "rank": ({"r": 5}, "r=5; set longlora.rank, which is 3, to that"),
    "scale": ({"lora_alpha": 16}, "lora_alpha=16; set longlora.alpha, which is 7.0, to that"),
    "dora": ({"use_dora": True}, "use_dora=True is not supported"),
    "kind": ({"peft_type": "IA3"}, "peft_type=IA3 should be LORA"),
    "model": ({}, "self_attn.q_proj.lora_A.weight has shape [3, 64]; this model's is [3, 32]"),
    "a-layer-without-norms": (["model.layers.2.input_layernorm.weight"], "layers.2.input_layernorm.weight is missing"),
    "missing": (["model.layers.1.self_attn.k_proj.lora_B.weight"], "self_attn.k_proj.lora_B.weight is missing"),
    "mlp": ("model.layers.0.mlp.up_proj.lora_A.weight", "up_proj.lora_A.weight is nothing that this longlora trains"),
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_an_adapter_of_another_kind_is_refused_by_key_and_value(models, trained, tmp_path, case):
    from safetensors.torch import load_file, save_file

    change, said = WRONG_ADAPTERS[case]
    convert_megatron_to_peft(trained, tmp_path / "adapter", 3)
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    if isinstance(change, dict):
        edit_json(tmp_path / "adapter/adapter_config.json", **change)
    elif isinstance(change, list):
        save_file({name: value for name, value in tensors.items() if not name.endswith(change[0])}, path)
    else:
        save_file(tensors | {f"base_model.model.{change}": torch.zeros(3, 4)}, path)
    recipe = recipe_for(*models("odd-vocab"), *LORA, f"longlora.init_from={tmp_path}/adapter")
    shape = read_shape(recipe.model.hf)
    if case == "model":
        shape = replace(shape, hidden_size=32)
    with pytest.raises(InputError) as refused:
        adapter_to_start_from(recipe.longlora, shape, "recipe.yaml")
    assert said in str(refused.value)
    assert "recipe.yaml: longlora.init_from=" in str(refused.value)
