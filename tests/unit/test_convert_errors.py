"""Bad input to the converters: exit code 2, one line that names the file or key, nothing left behind."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROOT, assert_one_line_error, edit_json, file_system_of, run_tool, small_llama

from endprompt_megatron.common.errors import run_cli
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A model in one file (`hf`), the same in shards (`sharded`), and converted (`megatron`)."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("originals")
    hf = small_llama(root / "hf", num_hidden_layers=2)
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(root / "sharded", max_shard_size="100KB")
    convert_hf_to_megatron(hf, root / "megatron")
    return root


@pytest.fixture
def place(tmp_path, originals) -> Path:
    """A copy to break."""
    return shutil.copytree(originals, tmp_path / "place")


def call(capsys, monkeypatch, tool: str, *arguments: object) -> SimpleNamespace:
    """Run a tool in this process, as its command line does: exit code, stdout and stderr."""
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_cli(module.main)
    printed = capsys.readouterr()
    return SimpleNamespace(returncode=stopped.value.code, stdout=printed.out, stderr=printed.err)


def edit_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def rename_first(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.z_proj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def name_a_stranger(index: Path) -> None:
    value = json.loads(index.read_text())
    value["weight_map"]["model.layers.9.extra"] = next(iter(value["weight_map"].values()))
    index.write_text(json.dumps(value))


def large_token(path: Path) -> None:
    value = json.loads(path.read_text())
    value["added_tokens"][0]["id"] = 320
    path.write_text(json.dumps(value))


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TO_MEGATRON = {
    "no-directory": ("nowhere", lambda d: None, ["nowhere", "no such directory"]),
    "no-config": ("hf", lambda d: (d / "config.json").unlink(), ["config.json", "no such file"]),
    "broken-config": ("hf", lambda d: (d / "config.json").write_text("{"), ["config.json", "cannot be read"]),
    "other-model": ("hf", lambda d: edit_json(d / "config.json", model_type="gpt2"), ["model_type=gpt2", "llama"]),
    "quantised-config": (
        "hf",
        lambda d: edit_json(d / "config.json", quantization_config={"bits": 4}),
        ["config.json", "quantised", "BF16"],
    ),
    "quantised-tensor": (
        "hf",
        lambda d: edit_weights(d / WEIGHTS, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)})),
        ["lm_head.weight", "I8", "quantised"],
    ),
    "mixed-dtypes": (
        "hf",
        lambda d: edit_weights(d / WEIGHTS, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()})),
        ["bfloat16", "float32", "--dtype"],
    ),
    "no-weights": ("hf", lambda d: (d / WEIGHTS).unlink(), [WEIGHTS, "save_pretrained"]),
    "truncated": ("hf", lambda d: truncate(d / WEIGHTS), [WEIGHTS, "truncated"]),
    "empty-file": ("hf", lambda d: (d / WEIGHTS).write_bytes(b""), [WEIGHTS, "truncated"]),
    "truncated-shard": (
        "sharded",
        lambda d: truncate(d / "model-00002-of-00005.safetensors"),
        ["model-00002-of-00005.safetensors", "truncated"],
    ),
    "missing-shard": (
        "sharded",
        lambda d: (d / "model-00002-of-00005.safetensors").unlink(),
        ["model-00002-of-00005.safetensors", "no such file"],
    ),
    "index-names-a-stranger": ("sharded", lambda d: name_a_stranger(d / INDEX), [INDEX, "model.layers.9.extra"]),
    "empty-index": ("sharded", lambda d: edit_json(d / INDEX, weight_map=None), [INDEX, "weight_map"]),
    "missing-tensor": (
        "hf",
        lambda d: edit_weights(d / WEIGHTS, lambda t: t.pop("model.norm.weight")),
        ["model.norm.weight", "missing"],
    ),
    "unexpected-tensor": (
        "hf",
        lambda d: edit_weights(d / WEIGHTS, rename_first),
        ["z_proj", "not a tensor of the model"],
    ),
    "wrong-shape": ("hf", lambda d: edit_json(d / "config.json", intermediate_size=96), ["[64, 112]", "[64, 96]"]),
    "more-layers": ("hf", lambda d: edit_json(d / "config.json", num_hidden_layers=3), ["model.layers.2.", "missing"]),
    "tied-but-different": (
        "hf",
        lambda d: edit_json(d / "config.json", tie_word_embeddings=True),
        ["lm_head.weight", "tie_word_embeddings=false"],
    ),
    "tokenizer-too-large": (
        "hf",
        lambda d: large_token(d / "tokenizer.json"),
        ["tokenizer.json", "320", "vocab_size=320"],
    ),
}


@pytest.mark.parametrize("case", TO_MEGATRON)
def test_conversion_to_megatron_refuses_bad_input(place, capsys, monkeypatch, case):
    directory, damage, needles = TO_MEGATRON[case]
    damage(place / directory)
    result = call(capsys, monkeypatch, "convert_hf_to_megatron", "--hf", place / directory, "--out", place / "out")
    assert_one_line_error(result, *needles)
    assert_nothing_left(place)


def iteration(place: Path) -> Path:
    return place / "megatron/iter_0000000"


TO_HF = {
    "no-directory": (["--megatron", "nowhere"], lambda p: None, ["--megatron", "nowhere", "no such directory"]),
    "empty": (["--megatron", "hf"], lambda p: None, ["hf", "no complete checkpoint"]),
    "cut-off-save": ([], lambda p: (iteration(p) / "endprompt.json").unlink(), ["no complete checkpoint"]),
    "cut-off-save-itself": (
        ["--megatron", "megatron/iter_0000000"],
        lambda p: (iteration(p) / "endprompt.json").unlink(),
        ["iter_0000000", "incomplete"],
    ),
    "no-such-iteration": (["--iteration", 7], lambda p: None, ["--iteration 7", "it holds 0"]),
    "two-iterations": (["--megatron", "megatron/iter_0000000", "--iteration", 7], lambda p: None, ["--iteration 7"]),
    "no-config": ([], lambda p: (iteration(p) / "hf/config.json").unlink(), ["hf/config.json", "no such file"]),
    "another-model": (
        [],
        lambda p: edit_json(iteration(p) / "hf/config.json", hidden_size=128),
        ["has shape [320, 64]", "[320, 128]", "another model"],
    ),
    "fewer-layers": (
        [],
        lambda p: edit_json(iteration(p) / "hf/config.json", num_hidden_layers=1),
        ["has shape [2, ", "[1, ", "another model"],
    ),
    "another-vocabulary": (
        [],
        lambda p: edit_json(iteration(p) / "hf/config.json", vocab_size=310),
        ["vocab_size=310", "320"],
    ),
    "tied-config": (
        [],
        lambda p: edit_json(iteration(p) / "hf/config.json", tie_word_embeddings=True),
        ["output_layer.weight", "tie_word_embeddings"],
    ),
    "manifest-of-the-future": ([], lambda p: edit_json(iteration(p) / "endprompt.json", format=2), ["format=2"]),
    "manifest-dtype": ([], lambda p: edit_json(iteration(p) / "endprompt.json", dtype="int4"), ["dtype='int4'"]),
    "no-metadata": ([], lambda p: (iteration(p) / ".metadata").unlink(), [".metadata", "damaged"]),
    "truncated-metadata": ([], lambda p: truncate(iteration(p) / ".metadata"), [".metadata", "damaged"]),
    "no-marker": ([], lambda p: (iteration(p) / "metadata.json").unlink(), ["metadata.json", "torch_dist"]),
    "missing-data": ([], lambda p: (iteration(p) / "__0_0.distcp").unlink(), ["__0_0.distcp", "damaged"]),
    "truncated-data": (
        [],
        lambda p: (iteration(p) / "__0_0.distcp").write_bytes(b"x" * 999),
        ["iter_0000000", "damaged"],
    ),
    "shard-size": (["--max-shard-size", "big"], lambda p: None, ["--max-shard-size big", "5GB"]),
    "dtype": (["--dtype", "int8"], lambda p: None, ["--dtype int8", "bfloat16"]),
}


@pytest.mark.parametrize("case", TO_HF)
def test_conversion_to_hugging_face_refuses_bad_input(place, capsys, monkeypatch, case):
    options, damage, needles = TO_HF[case]
    damage(place)
    monkeypatch.chdir(place)
    if "--megatron" not in options:
        options = ["--megatron", place / "megatron", *options]
    result = call(capsys, monkeypatch, "convert_megatron_to_hf", *options, "--out", place / "out")
    assert_one_line_error(result, *needles)
    assert_nothing_left(place)


TOOLS = {"convert_hf_to_megatron": ("--hf", "hf"), "convert_megatron_to_hf": ("--megatron", "megatron")}


@pytest.mark.parametrize("tool", TOOLS)
def test_conversion_leaves_an_existing_output_alone(place, capsys, monkeypatch, tool):
    flag, source = TOOLS[tool]
    (place / "out").mkdir()
    (place / "out/mine").write_text("kept")
    result = call(capsys, monkeypatch, tool, flag, place / source, "--out", place / "out")
    assert_one_line_error(result, "--out", "already exists")
    assert (place / "out/mine").read_text() == "kept"


@pytest.mark.parametrize("tool", TOOLS)
def test_conversion_refuses_an_output_below_a_file(place, capsys, monkeypatch, tool):
    flag, source = TOOLS[tool]
    (place / "file").write_text("")
    result = call(capsys, monkeypatch, tool, flag, place / source, "--out", place / "file/out")
    assert_one_line_error(result, "--out", "cannot be written")


@pytest.fixture
def small_disk(tmp_path):
    with file_system_of(tmp_path / "disk", "100k") as mount:
        yield mount


@pytest.mark.parametrize("told", [True, False], ids=["before", "while-writing"])
@pytest.mark.parametrize("tool", TOOLS)
def test_conversion_to_a_full_disk_is_one_line(originals, small_disk, capsys, monkeypatch, tool, told):
    if not told:  # as on disks where the free space is not what one user may take
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    flag, source = TOOLS[tool]
    result = call(capsys, monkeypatch, tool, flag, originals / source, "--out", small_disk / "out")
    assert_one_line_error(result, "--out", "no space left")
    assert list(small_disk.iterdir()) == []


def test_conversion_tool_gives_one_line_and_exit_code_2(tmp_path):
    result = run_tool("convert_hf_to_megatron", "--hf", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert_one_line_error(result, "nowhere")


def assert_nothing_left(place: Path) -> None:
    assert not (place / "out").exists()
    assert not [path.name for path in place.iterdir() if "partial" in path.name]
