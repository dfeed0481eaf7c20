"""A checkpoint that the converter wrote and one that a training run saved stand for each other, in every layout."""

import json
import shutil

import numpy as np
import pytest
import torch
from parallel.cases import build, exported, recipe_for, weights_held
from parallel.reloading import reload
from safetensors.torch import load_file
from small import small_llama

from endprompt_megatron.checkpoint.layout import write_manifest
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.files import checksums_of
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

LAYOUTS = {  # tensor, pipeline
    "tp1": (1, 1),
    "tp2-pp2": (2, 2),
    "pp4": (1, 4),
}
MODELS = {
    "untied-odd": {"vocab_size": 321, "head_dim": 24, "dtype": "bfloat16"},
    "qwen2-tied": {"model_type": "qwen2", "vocab_size": 321, "tie_word_embeddings": True, "dtype": "bfloat16"},
}


def start_and_save(recipe, root):
    """On a rank: load, and save without a step, with optimizer state."""
    from endprompt_megatron.checkpoint.run_state import Progress, RunState
    from endprompt_megatron.checkpoint.save import Saver

    _, models, optimizer, scheduler = build(recipe)
    state = RunState(models, optimizer, scheduler)
    with Saver(root, recipe, {"config.json": exported(recipe)}, state) as saver:
        saver.save(Progress(step=3))
        saver.wait()


def keys(layout):
    tensor, pipeline = LAYOUTS[layout]
    both = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}")
    return tensor * pipeline, ("precision.dtype=bfloat16", *both)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """For each model: Hugging Face's files, and their conversion."""
    root = tmp_path_factory.mktemp("interchange")
    for name, fields in MODELS.items():
        small_llama(root / name / "hf", **fields)
        convert_hf_to_megatron(root / name / "hf", root / name / "megatron")
    return root


@pytest.mark.parametrize(
    "written_by", [pytest.param(name, marks=[] if name == "tp2-pp2" else pytest.mark.full) for name in LAYOUTS]
)
@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_of_training_is_read_like_one_of_the_conversion(place, ranks, tmp_path, model, written_by):
    hf, converted, saved = place / model / "hf", place / model / "megatron", tmp_path / "saved"
    count, overrides = keys(written_by)
    ranks.run(count, start_and_save, recipe_for(tmp_path, hf, converted, *overrides), saved)

    # Every tensor of the files, whatever parts it lies there in.
    left, right = Checkpoint(converted / "iter_0000000"), Checkpoint(saved / "iter_0000003")
    for key in left.tensors:
        shape = left.shape(key)
        assert right.shape(key)[1:] == shape[1:]
        assert right.shape(key)[0] in (shape[0], shape[0] + shape[0] % 2)  # padded for two tensor ranks
        parts = [each.read(key, (0,) * len(shape), shape, torch.bfloat16) for each in (left, right)]
        assert torch.equal(*parts), key
    assert any(key.startswith("optimizer") for key in right.tensors)

    # What ranks of each layout hold, master weights included.
    for layout in LAYOUTS:
        count, overrides = keys(layout)
        found, expected = (
            ranks.run(count, weights_held, recipe_for(tmp_path, hf, converted, *overrides, f"model.init_from={source}"))
            for source in (saved, converted)
        )
        for rank in range(count):
            assert found[rank].keys() == expected[rank].keys()
            for name, value in expected[rank].items():
                np.testing.assert_array_equal(value, found[rank][name], err_msg=f"{layout}, rank {rank}: {name}")

    convert_megatron_to_hf(saved, tmp_path / "back")
    source, exported_back = (load_file(at / "model.safetensors") for at in (hf, tmp_path / "back"))
    assert source.keys() == exported_back.keys()
    for name, value in source.items():
        assert torch.equal(value, exported_back[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatrons_own_loader_reads_what_training_saved(place, ranks, tmp_path, layout):
    """Its strict loading leaves nothing unread but the optimizer's state."""
    model = place / "untied-odd"
    count, overrides = keys("tp2-pp2")
    recipe = recipe_for(tmp_path, model / "hf", model / "megatron", *overrides)
    ranks.run(count, start_and_save, recipe, tmp_path / "saved")
    saved, again = tmp_path / "saved/iter_0000003", tmp_path / "again/iter_0000003"
    tensor, pipeline = LAYOUTS[layout]
    ranks.run(tensor * pipeline, reload, saved, model / "hf", again, (tensor, pipeline, 1), "bfloat16")
    shutil.copytree(saved / "hf", again / "hf")
    manifest = json.loads((saved / "endprompt.json").read_text())
    said = {key: value for key, value in manifest.items() if key not in ("format", "files", "crc32")}
    write_manifest(again, **said, files=checksums_of(again, []))
    convert_megatron_to_hf(tmp_path / "again", tmp_path / "back")
    source, back = (load_file(at / "model.safetensors") for at in (model / "hf", tmp_path / "back"))
    for name, value in source.items():
        assert torch.equal(value, back[name]), name
