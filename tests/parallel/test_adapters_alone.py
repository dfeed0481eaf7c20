"""Checkpoints without the frozen weights: the run, its exports and its evaluation are those of complete ones."""

import shutil

import pytest
import torch
from parallel.cases import recipe_for
from parallel.test_checkpoints import assert_same, everything, train_and_save
from parallel.test_engine_megatron import ask_megatron
from parallel.test_longlora import LAYOUTS, LORA, MLP, batches_for
from safetensors.torch import load_file
from small import assert_one_line_error, edit_json, run_tool

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert.describe_checkpoint import inspect
from endprompt_megatron.convert.peft_adapter import convert_megatron_to_peft
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.verify import verify
from endprompt_megatron.model.shape import read_shape

KEYS = [*LORA, *MLP, "precision.dtype=bfloat16"]
ALONE = "longlora.save_frozen=false"
FORMS = ("hf", "megatron")


@pytest.fixture(scope="module")
def bases(models, tmp_path_factory):
    """The base in both forms, in a place from where it can be moved."""
    place = tmp_path_factory.mktemp("bases")
    shutil.copytree(models("odd-vocab")[1], place / "hf")
    shutil.copytree(models("odd-vocab")[2], place / "megatron")
    return place


@pytest.fixture(scope="module")
def complete(ranks, models, tmp_path_factory):
    """Four steps on two tensor-parallel ranks, and what was seen; the last checkpoint with all weights."""
    root = tmp_path_factory.mktemp("complete")
    recipe = recipe_for(*models("odd-vocab"), "parallel.tensor=2", *KEYS)
    return root, ranks.run(2, train_and_save, recipe, batches_for(recipe, 4), root)


@pytest.fixture(scope="module", params=["hf", pytest.param("megatron", marks=pytest.mark.full)])
def alone(request, ranks, models, bases, complete, tmp_path_factory):
    """The same run over each form of the base, stopped after two steps and gone on with."""
    root = tmp_path_factory.mktemp(request.param)
    keys = ["parallel.tensor=2", *KEYS, ALONE, f"model.init_from={bases / request.param}"]
    recipe = recipe_for(*models("odd-vocab"), *keys)
    batches = batches_for(recipe, 4)
    seen = [ranks.run(2, train_and_save, recipe, part, root) for part in (batches[:2], batches[2:])]
    assert [first + second for first, second in zip(*seen, strict=True)] == complete[1], "to the last bit"
    return request.param, root


def test_a_checkpoint_holds_what_is_trained_alone(models, alone, complete):
    form, root = alone
    vocab = read_shape(models("odd-vocab")[1]).vocab_size
    found, expected = everything(root / "iter_0000004", vocab), everything(complete[0] / "iter_0000004", vocab)
    frozen = expected.keys() - found.keys()
    assert {"output_layer.weight", "decoder.layers.mlp.linear_fc1.weight"} < frozen
    assert not any("adapter" in key or "optimizer" in key or "norm" in key for key in frozen)
    assert_same(found, {key: value for key, value in expected.items() if key not in frozen})
    assert form in inspect(root, 4).training["without"]


def test_every_layout_resumes_it_over_its_base(ranks, models, bases, alone, tmp_path):
    form, root = alone
    vocab = read_shape(models("odd-vocab")[1]).vocab_size
    copy = shutil.copytree(root, tmp_path / "run")
    for step, layout in enumerate(("one", "tp2-pp2-sp"), start=5):
        world, keys = LAYOUTS[layout]
        given = [*KEYS, *keys, f"model.init_from={bases / form}", "longlora.save_frozen=" + str(step == 6).lower()]
        ranks.run(world, train_and_save, recipe_for(*models("odd-vocab"), *given), [], copy)
    found, base = everything(copy / "iter_0000006", vocab), everything(bases / "megatron" / "iter_0000000", vocab)
    for key in ("output_layer.weight", "decoder.layers.mlp.linear_fc1.weight"):
        assert torch.equal(found[key], base[key].bfloat16()), key


def test_its_export_and_its_evaluation_are_those_of_a_complete_checkpoint(ranks, alone, complete, tmp_path):
    for name, root in (("alone", alone[1]), ("complete", complete[0])):
        convert_megatron_to_hf(root, tmp_path / name, workers=2)
        convert_megatron_to_peft(root, tmp_path / f"{name}-adapter")
    for file in ("alone/model", "alone-adapter/adapter_model"):
        found = load_file(tmp_path / f"{file}.safetensors")
        expected = load_file(tmp_path / f"{file.replace('alone', 'complete')}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
    assert "alone" in str(verify(tmp_path / "alone", alone[1], to_hf=True))
    (asked,) = ranks.run(1, ask_megatron, alone[1] / "iter_0000004", (1, 1), 32)
    (expected,) = ranks.run(1, ask_megatron, complete[0] / "iter_0000004", (1, 1), 32)
    assert (asked["whole"][0] == expected["whole"][0]).all()


def test_a_base_that_has_moved_is_named_by_an_option_and_another_one_refused(models, bases, alone, tmp_path):
    form, root = alone
    away, other = tmp_path / "moved", models("gqa")[1 + FORMS.index(form)]
    asked = ("--megatron", root, "--out", tmp_path / "out")
    shutil.move(bases / form, away)
    try:
        assert_one_line_error(run_tool("convert_megatron_to_hf", *asked), str(bases / form), "is not there", "--base")
        with pytest.raises(InputError, match="holds other weights"):
            convert_megatron_to_hf(root, tmp_path / "out", base=other)
        assert not (tmp_path / "out").exists()
        done = run_tool("convert_megatron_to_hf", *asked, "--base", away, "--verify")
        assert done.returncode == 0, done.stderr
        assert "verified" in done.stdout
        convert_megatron_to_peft(root, tmp_path / "adapter")  # which needs nothing of it
    finally:
        shutil.move(away, bases / form)


def test_a_base_that_was_changed_in_place_is_refused(ranks, models, bases, alone, tmp_path):
    form, root = alone
    copy = shutil.copytree(root, tmp_path / "run")
    changed = shutil.copytree(bases / form, tmp_path / "base")
    manifest = copy / "iter_0000004" / "endprompt.json"
    if form == "hf":
        with open(changed / "model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
    else:
        edit_json(changed / "iter_0000000" / manifest.name, crc32=1)
    recipe = recipe_for(*models("odd-vocab"), *KEYS, ALONE, f"model.init_from={changed}")
    shutil.move(bases / form, tmp_path / "away")
    try:
        with pytest.raises(AssertionError, match=r"its base cannot be found|does not have the CRC-32"):
            ranks.run(1, train_and_save, recipe, [], copy)
    finally:
        shutil.move(tmp_path / "away", bases / form)
