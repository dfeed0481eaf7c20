"""Conversion is exact: there and back to the last bit, in every shape, and Megatron's own model agrees with the map."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import run_tool, scaled_config, small_llama, small_tokenizer

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.files import checksums_of
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.hf_weights import HfWeights
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf, parse_size
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.shape import read_shape

SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head-dim": {"head_dim": 24},
    "odd-vocabulary": {"vocab_size": 321},
    "odd-tied-bf16": {"vocab_size": 321, "tie_word_embeddings": True, "dtype": "bfloat16"},
    "one-layer": {"num_hidden_layers": 1},
    "llama3-rope": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "fp16": {"dtype": "float16"},
    "attention-bias": {"attention_bias": True, "head_dim": 24},
    "mlp-bias": {"mlp_bias": True},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES = {
    "llama-2": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 320},
    "llama-3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "vocab_size": 328},
    "llama-3.1": {"rope_parameters": LLAMA3 | {"factor": 8.0}, "vocab_size": 328},
    "llama-3.2": {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    "llama-3.3": {"rope_parameters": LLAMA3 | {"factor": 8.0}, "num_attention_heads": 8, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "vocab_size": 328, "sliding_window": None},
    "smollm2": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48, "tie_word_embeddings": True},
    "qwen2.5": {"model_type": "qwen2", "vocab_size": 322},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
    "qwen2.5-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
}
SHAPES |= {
    f"{family}-{dtype}": fields | {"dtype": dtype}
    for family, fields in FAMILIES.items()
    for dtype in ("bfloat16", "float16", "float32")
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(left: Path, right: Path) -> None:
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("shape", SHAPES)
def test_conversion_there_and_back_is_bit_exact(tmp_path, shape):
    hf = small_llama(tmp_path / "hf", **SHAPES[shape])
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")

    assert_same_weights(hf, tmp_path / "back")
    # Not only the tensors: the file is the one that transformers wrote.
    assert (hf / "model.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()
    config, exported = (json.loads((place / "config.json").read_text()) for place in (hf, tmp_path / "back"))
    assert exported.pop("torch_dtype") == config["dtype"]
    assert exported == config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (hf / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_an_exported_model_loads_in_transformers_with_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = small_llama(tmp_path / "hf", vocab_size=321, dtype="bfloat16")
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")

    tokens = AutoTokenizer.from_pretrained(tmp_path / "back")("the end of the text", return_tensors="pt")["input_ids"]
    models = [AutoModelForCausalLM.from_pretrained(place, dtype="auto") for place in (hf, tmp_path / "back")]
    assert models[1].dtype == torch.bfloat16
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        assert torch.equal(*(model(tokens, attention_mask=mask).logits for model in models))


def test_shards_and_index_equal_those_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    hf = small_llama(tmp_path / "hf", dtype="bfloat16")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(hf, dtype="auto").save_pretrained(sharded, max_shard_size="60KB")
    small_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    convert_hf_to_megatron(sharded, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size="60KB")

    names = sorted(path.name for path in sharded.glob("*.safetensors*"))
    assert names == sorted(path.name for path in (tmp_path / "back").glob("*.safetensors*"))
    for name in names:
        assert (sharded / name).read_bytes().strip() == (tmp_path / "back" / name).read_bytes().strip(), name


def test_conversion_casts_only_when_a_dtype_is_given(tmp_path):
    hf = small_llama(tmp_path / "hf")
    convert_hf_to_megatron(hf, tmp_path / "megatron", dtype="bf16")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "wide", dtype="float32")

    source = weights(hf)
    for directory, dtype in (("back", torch.bfloat16), ("wide", torch.float32)):
        config = json.loads((tmp_path / directory / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
        for name, tensor in weights(tmp_path / directory).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor.to(torch.float32), source[name].to(torch.bfloat16).to(torch.float32)), name


def test_rotary_buffers_and_a_copy_of_tied_embeddings_are_ignored(tmp_path):
    from safetensors.torch import save_file

    hf = small_llama(tmp_path / "hf", tie_word_embeddings=True)
    tensors = weights(hf)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file({**tensors, **extra}, hf / "model.safetensors", {"format": "pt"})
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    exported = weights(tmp_path / "back")
    assert exported.keys() == tensors.keys()


def test_the_map_of_weights_equals_an_independent_computation(tmp_path):
    """Group by group, the way Megatron's attention and gated MLP take their weights apart."""
    hf = small_llama(tmp_path / "hf", head_dim=24)
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    checkpoint, source = Checkpoint(tmp_path / "megatron/iter_0000000"), weights(hf)

    def read(key):
        return checkpoint.read(key, (0,) * len(checkpoint.shape(key)), checkpoint.shape(key), torch.float32)

    qkv, fc1 = read("decoder.layers.self_attention.linear_qkv.weight"), read("decoder.layers.mlp.linear_fc1.weight")
    for layer in range(4):
        q, k, v = (source[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
        rows = []
        for group in range(2):
            rows += [q[24 * head : 24 * (head + 1)] for head in (2 * group, 2 * group + 1)]
            rows += [k[24 * group : 24 * (group + 1)], v[24 * group : 24 * (group + 1)]]
        assert torch.equal(qkv[layer], torch.cat(rows))
        gate, up = (source[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        assert torch.equal(fc1[layer], torch.cat([gate, up]))


def test_the_map_of_weights_names_each_of_a_model_once(tmp_path):
    hf = small_llama(tmp_path / "hf")
    shape = read_shape(hf)
    mapped = list(mapping.mapped_tensors(shape))
    names = [name for tensor in mapped for name, _ in tensor.hf]
    assert names == list(dict.fromkeys(names))
    assert set(names) == HfWeights(hf).tensors.keys()
    assert sum(tensor.elements for tensor in mapped) == shape.parameters


def test_only_the_models_tensors_are_exported_from_a_training_checkpoint(tmp_path):
    """Optimizer state lies in the same files; the vocabulary is padded; the newest complete iteration counts."""
    from endprompt_megatron.checkpoint import shard_files, torch_dist

    hf = small_llama(tmp_path / "hf", dtype="bfloat16", vocab_size=321)
    convert_hf_to_megatron(hf, tmp_path / "megatron")
    first = Checkpoint(tmp_path / "megatron/iter_0000000")
    stored = []

    def add(key, tensor):
        sizes = tuple(tensor.shape)
        stored.append(shard_files.Shard(key, sizes, (0,) * len(sizes), sizes, tensor.dtype, lambda: tensor))

    for key in first.tensors:
        tensor = first.read(key, (0,) * len(first.shape(key)), first.shape(key), torch.bfloat16)
        if key in mapping.PADDED:
            tensor = torch.cat([tensor, torch.full((7, 64), 9.0, dtype=torch.bfloat16)])
        add(key, tensor)
        add(f"optimizer.state.exp_avg.{key}", torch.randn(tensor.shape))
    target = tmp_path / "run/iter_0000030"
    target.mkdir(parents=True)
    torch_dist.describe(target, [shard_files.write_file(target, "__0_0.distcp", stored, {})], {})
    layout.copy_hf_files(first.directory / "hf", target / "hf")
    recipe = {
        "model": {"hf": "/data/Some-Model"},
        "context": {"method": "end_prompt", "target": 65536, "rope": {"type": "linear", "factor": 8.0}},
        "train": {"tokens": 1_000_000_000, "steps": None},
    }
    layout.write_manifest(
        target,
        step=30,
        consumed_samples=1920,
        recipe=recipe,
        vocab_size=321,
        dtype="bfloat16",
        source="hf",
        files=checksums_of(target, []),
    )
    (tmp_path / "run/iter_0000040").mkdir()  # a save that was cut off
    assert layout.complete_iterations(tmp_path / "run") == [30]
    assert layout.newest_iteration(tmp_path / "run") == 30
    convert_megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")
    card = (tmp_path / "back/README.md").read_text()
    rows = ("| Target window | 65536 |", "| RoPE factor | 8.0 |", "| Steps trained | 30 |", "| Tokens asked for | 1000")
    for row in (*rows, "| Base model | Some-Model |", "| Sequences trained on | 1920 |"):
        assert row in card, row
    assert "/data" not in card
    assert "Steps asked for" not in card


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_model_card_of_linear_scaling_says_what_vllm_needs_and_what_keeps_retrieval(tmp_path, rope):
    from endprompt_megatron.convert.model_card import model_card

    hf = small_llama(tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(scaled_config(config, rope, 4.0, 64, 256)))
    manifest = {"recipe": {"context": {"rope": {"type": rope}, "retain": {"weight": 0.5}}}, "source": "base"}
    card = model_card(manifest | {"step": 3, "consumed_samples": 24}, read_shape(hf), "float32")
    for words in ("--max-model-len 256", "recipes/*_recommended.yaml"):
        assert (words in card) == (rope == "linear")
    assert "| Weight of the divergence from the base | 0.5 |" in card


def test_metadata_json_names_megatrons_format():
    from dataclasses import asdict

    from megatron.core.dist_checkpointing.core import CheckpointingConfig

    from endprompt_megatron.checkpoint.torch_dist import FORMAT

    # 0.19 has fewer fields and ignores those it does not know.
    assert asdict(CheckpointingConfig("torch_dist", 1)).items() <= FORMAT.items()


def test_conversion_tools_print_what_they_wrote(tmp_path):
    hf = small_llama(tmp_path / "hf")
    there = run_tool("convert_hf_to_megatron", "--hf", hf, "--out", tmp_path / "megatron")
    back = run_tool("convert_megatron_to_hf", "--megatron", tmp_path / "megatron/iter_0000000", "--out", tmp_path / "b")
    for result, out in ((there, "megatron"), (back, "b")):
        assert result.returncode == 0, result.stderr
        assert not result.stderr
        assert result.stdout.startswith(f"wrote {tmp_path / out}: 39 tensors, 706.8 kB, float32"), result.stdout
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "0\n"
    assert_same_weights(hf, tmp_path / "b")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2**31), ("77", 77)])
def test_max_shard_size_takes_units(text, size):
    assert parse_size(text) == size
