"""LongLoRA: shifted attention and LoRA against transformers with a dense mask and adapters made by hand.

In float64, where both agree to the last digits.  In float32, once a layout, ours are as exact as transformers' are.
"""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from float64 import Float64, in_float64
from pairwise import Case, covering, named
from parallel.cases import (
    build,
    every_target,
    exported,
    make_samples,
    micro_batches,
    recipe_for,
)
from parallel.reference import assert_as_exact, compare, compare_float32, huggingface_model
from parallel.test_checkpoints import assert_same, everything, train_and_save
from parallel.test_engine_megatron import ask_megatron
from small import run_tool

from endprompt_megatron.checkpoint.layout import read_manifest, write_manifest
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert.describe_checkpoint import inspect
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.shape import read_shape

LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tp2-pp2-sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "tp2-dp2-overlap": (
        4,
        ["parallel.tensor=2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
}
SHIFTED = ["longlora.shifted=true"]
LORA = ["longlora.rank=3", "longlora.alpha=7"]
MLP = ["longlora.mlp=true"]
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # of which the MLP's are the last three
AXES = {
    "layout": LAYOUTS,
    "kind": {"shifted": SHIFTED, "lora": LORA, "shifted-lora": [*SHIFTED, *LORA]},
    "shape": ("gqa", "mha", "odd-vocab-tied", "attention-bias"),
    "trained": {
        "all": [],
        "norms-frozen": ["longlora.train_norms=false"],
        "adapters-alone": ["longlora.train_embeddings=false", "longlora.train_norms=false"],
    },
    "targets": {"attention": [], "mlp": MLP},
    "recompute": {"kept": [], "recomputed": ["parallel.recompute=full"]},
    "groups": {"four-groups": [], "two-groups": ["longlora.groups=2"]},
    "length": {"prompted": [], "full-length": ["context.method=full", "context.physical=256"]},
    "rows": {"one-row": [], "two-rows": ["train.micro_batch_size=2"]},
}


def allowed(case: Case) -> bool:
    """Groups are cut from whole sequences, and without adapters everything is trained."""
    if "shifted" in case["kind"] and case["layout"] == "cp2":
        return False
    return case["kind"] != "shifted" or (case["trained"] == "all" and case["targets"] == "attention")


def mask_of(heads: int, length: int, groups: int = 4) -> torch.Tensor:
    """[1, h, s, s] bool: each token's group is counted from where its head's cuts are."""
    group = length // groups
    tokens = torch.arange(length)
    number = torch.stack([(tokens + (group // 2 if head >= heads // 2 else 0)) // group for head in range(heads)])
    return ((number[:, :, None] == number[:, None, :]) & (tokens[:, None] >= tokens))[None]


class Lora(torch.nn.Module):
    """y + alpha / r * B A x, as published."""

    def __init__(self, base: torch.nn.Linear, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down, self.up = torch.nn.Parameter(down.float()), torch.nn.Parameter(up.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.down.t()) @ self.up.t()


def matrices(layer: int, which: str, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one adapter, both far from zero; float32, and the same numbers under Float64.

    Were A as large in a wide model, attention would look at one token alone and gradients be lost in rounding.
    """
    generator = np.random.default_rng(100 * layer + TARGETS.index(which))
    down, up = (0.3 * generator.standard_normal(size, np.float32) for size in ((rank, inputs), (outputs, rank)))
    return torch.from_numpy(down) * (64 / inputs), torch.from_numpy(up)


def huggingface_lora(recipe):
    """transformers' model with adapters, and frozen as the recipe says."""
    longlora = recipe.longlora
    model = huggingface_model(recipe)
    for name, parameter in model.named_parameters():
        trained = longlora.train_norms if "norm" in name else longlora.train_embeddings and "embed" in name
        parameter.requires_grad_(trained)
    for layer, block in enumerate(model.model.layers):
        for number, which in enumerate(TARGETS if longlora.mlp else TARGETS[:4]):
            holder = block.self_attn if number < 4 else block.mlp
            base = getattr(holder, f"{which}_proj")
            made = matrices(layer, which, longlora.rank, base.in_features, base.out_features)
            setattr(holder, f"{which}_proj", Lora(base, *made, longlora.alpha / longlora.rank))
    return model


def set_adapters(shape, mlp, models) -> None:
    """On a rank: the same adapters, cut by hand."""
    from megatron.core import parallel_state

    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    queries, keys, hidden = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.hidden_size

    @torch.no_grad()
    def by_outputs(number, adapter, **outputs) -> None:
        downs = []
        for which, rows in outputs.items():
            down, up = matrices(number, which, adapter.rank, hidden, rows)
            downs.append(down)
            getattr(adapter, f"up_{which}").copy_(up.chunk(tp)[rank])
        adapter.down.copy_(torch.cat(downs))

    @torch.no_grad()
    def by_inputs(number, adapter, which, inputs) -> None:
        down, up = matrices(number, which, adapter.rank, inputs, hidden)
        adapter.down.copy_(down.chunk(tp, 1)[rank])
        adapter.up.copy_(up)

    for layer in (layer for model in models for layer in model.module.decoder.layers):
        number = layer.layer_number - 1
        by_outputs(number, layer.self_attention.linear_qkv.adapter, q=queries, k=keys, v=keys)
        by_inputs(number, layer.self_attention.linear_proj.adapter, "o", queries)
        if mlp:
            by_outputs(number, layer.mlp.linear_fc1.adapter, gate=shape.ffn_size, up=shape.ffn_size)
            by_inputs(number, layer.mlp.linear_fc2.adapter, "down", shape.ffn_size)


def prepared(models, case: Case):
    """Ranks, recipe, samples, and what makes the ranks' model and transformers' the same."""
    world, keys = LAYOUTS[case["layout"]]
    others = (AXES[axis][value] for axis, value in case.items() if axis not in ("layout", "shape"))
    recipe = recipe_for(*models(case["shape"]), *keys, *(key for keys in others for key in keys))
    return world, recipe, *samples_and_model(recipe)


def samples_and_model(recipe, rows: int = 8) -> tuple[dict, dict]:
    """Samples, and how transformers and the ranks are to have the same adapters and the same mask."""
    shape, how = read_shape(recipe.model.hf), {}
    if recipe.longlora.shifted:
        how["mask"] = mask_of(shape.num_heads, recipe.context.physical, recipe.longlora.groups)
    if recipe.longlora.rank:
        how |= {"make": huggingface_lora, "prepare": partial(set_adapters, shape, recipe.longlora.mlp)}
    return make_samples(recipe, shape.vocab_size, rows), how


@pytest.mark.parametrize("case", covering(AXES, allowed), ids=named)
def test_gradients_equal_those_of_a_dense_mask_and_adapters_made_by_hand(ranks, models, case):
    world, recipe, samples, how = prepared(models, case)
    compare(ranks, world, recipe, samples, samples, **how)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", AXES["kind"])
@pytest.mark.parametrize("shape", AXES["shape"])
def test_gradients_of_whatever_is_trained_equal_those_of_adapters_made_by_hand(ranks, models, shape, kind, layout):
    """The product of what is trained, recompute, models, kinds and layouts; the rest takes turns."""
    turn = list(LAYOUTS).index(layout) + list(AXES["kind"]).index(kind) + AXES["shape"].index(shape)
    for number, (trained, recompute) in enumerate(itertools.product(AXES["trained"], AXES["recompute"])):
        rest = {axis: list(AXES[axis])[(turn + number) % 2] for axis in ("groups", "length", "rows", "targets")}
        own = {"layout": layout, "kind": kind, "shape": shape, "trained": trained, "recompute": recompute, **rest}
        if allowed(own | ({"targets": "attention"} if kind == "shifted" else {})):
            world, recipe, samples, how = prepared(models, own)
            compare(ranks, world, recipe, samples, samples, **how)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_gradients_are_as_exact_as_with_a_dense_mask_and_adapters_made_by_hand(ranks, models, layout):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models("gqa"), *keys, *LORA, *(SHIFTED if layout != "cp2" else []))
    samples, how = samples_and_model(recipe)
    compare_float32(ranks, world, recipe, samples, samples, **how)


def started(recipe) -> tuple:
    """On a rank: the loss and every adapter as training finds them, by its name in a checkpoint."""
    from endprompt_megatron.checkpoint.weights import weights_of
    from endprompt_megatron.training.step import run_batch

    shape, models, _, _ = build(recipe)
    samples = make_samples(recipe, shape.vocab_size, 4)
    losses = run_batch(models, micro_batches(recipe, samples), backward=False)
    parts = [
        (w.key, w.global_shape, w.offset, w.tensor.numpy().copy()) for w in weights_of(models) if ".adapter." in w.key
    ]
    return losses.total, parts


def test_adapters_start_at_the_base_models_loss_and_alike_in_every_layout(ranks, models):
    found = {}
    for layout in ("one", "tp2-sp", "pp2-vpp2"):
        world, keys = LAYOUTS[layout]
        base = ranks.run(world, started, recipe_for(*models("gqa"), *keys))
        with_lora = ranks.run(world, started, recipe_for(*models("gqa"), *keys, *LORA, *MLP))
        assert with_lora[0][0] == base[0][0], "B is zero, and so is what it adds"
        whole: dict[str, np.ndarray] = {}
        for _, parts in with_lora:
            for key, shape, offset, value in parts:
                box = tuple(slice(begin, begin + count) for begin, count in zip(offset, value.shape, strict=True))
                whole.setdefault(key, np.full(shape, np.nan, np.float32))[box] = value
        assert len(whole) == 11
        found[layout] = whole
    for key, value in found["one"].items():
        assert (value == 0).all() == (".up" in key), key
        for other in ("tp2-sp", "pp2-vpp2"):
            np.testing.assert_array_equal(found[other][key], value, err_msg=f"{other} {key}")


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2-vpp2"])
def test_validation_and_its_probe_see_all_tokens_despite_shifted_attention(ranks, models, layout):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*models("gqa"), *keys)
    samples = make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 4)
    full = ranks.run(world, every_target, recipe, samples)
    shifted = ranks.run(world, every_target, recipe_for(*models("gqa"), *keys, *SHIFTED), samples)
    for ours, theirs in zip(shifted, full, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours[0], theirs[0])


def batches_for(recipe, count) -> list:
    vocab = read_shape(recipe.model.hf).vocab_size
    return [make_samples(recipe, vocab, 8, seed=step) for step in range(count)]


@pytest.fixture(scope="module")
def trained(ranks, models, tmp_path_factory):
    """Three steps with adapters on two tensor-parallel and two data-parallel ranks, in float32."""
    root = tmp_path_factory.mktemp("longlora")
    recipe = recipe_for(*models("odd-vocab"), "parallel.tensor=2", *LORA, *MLP, *SHIFTED)
    ranks.run(4, train_and_save, recipe, batches_for(recipe, 3), root)
    return root


def test_saved_state_of_adapters_is_the_same_in_every_layout_and_of_trained_weights(ranks, models, trained, tmp_path):
    root = shutil.copytree(trained, tmp_path / "run")
    recipe = recipe_for(*models("odd-vocab"), *LORA, *MLP, *SHIFTED)
    vocab = read_shape(recipe.model.hf).vocab_size
    expected = everything(root / "iter_0000003", vocab)
    states = {key.removeprefix("optimizer.state.exp_avg.") for key in expected if ".exp_avg." in key}
    frozen = {key for key in expected if key not in states and key.startswith(("decoder", "embedding", "output"))}
    assert "embedding.word_embeddings.weight" in states
    assert all(".adapter." in key or "norm" in key for key in states - {"embedding.word_embeddings.weight"})
    assert {key for key in expected if ".adapter." in key and not key.startswith("optimizer")} <= states
    assert "output_layer.weight" in frozen
    assert "decoder.layers.self_attention.linear_qkv.weight" in frozen
    converted = everything(models("odd-vocab")[2] / "iter_0000000", vocab)
    for key in frozen:
        assert torch.equal(expected[key], converted[key]), key
    for step, layout in enumerate(("one", "tp2-pp2-sp"), start=4):
        world, keys = LAYOUTS[layout]
        ranks.run(world, train_and_save, recipe_for(*models("odd-vocab"), *LORA, *MLP, *SHIFTED, *keys), [], root)
        assert_same(everything(root / f"iter_{step:07d}", vocab), dict(expected))


def test_training_with_adapters_resumes_to_the_last_bit(ranks, models, tmp_path):
    keys = [*LORA, *SHIFTED, "precision.dtype=bfloat16"]
    recipe = recipe_for(*models("gqa"), *keys, "checkpoint.async=true")
    batches = batches_for(recipe, 4)
    whole = ranks.run(2, train_and_save, recipe, batches, tmp_path / "whole")
    first = ranks.run(2, train_and_save, recipe, batches[:2], tmp_path / "parts")
    second = ranks.run(2, train_and_save, recipe, batches[2:], tmp_path / "parts")
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    with pytest.raises(AssertionError, match=r"longlora\.alpha=9\.0 but .* was trained with 7\.0"):
        ranks.run(2, train_and_save, recipe_for(*models("gqa"), *keys, "longlora.alpha=9"), [], tmp_path / "parts")


def logits_of(recipe, root, tokens) -> np.ndarray:
    """On one rank: logits [s, v] in float64 of a checkpoint as it is, adapters beside the weights."""
    from endprompt_megatron.checkpoint.resume import resume
    from endprompt_megatron.checkpoint.run_state import RunState

    _, models, optimizer, scheduler = build(recipe)
    state = RunState(models, optimizer, scheduler)
    assert resume(root, recipe, "test", state) is not None
    model = models[0].module.eval()
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad(), Float64():
        return model.double()(torch.from_numpy(tokens)[None], positions)[0].numpy()


def test_merged_logits_equal_those_of_the_adapters(ranks, models, trained, tmp_path):
    """In float64; the export's matrices are rounded to float32, which costs no more than to calculate in it."""
    recipe = recipe_for(*models("odd-vocab"), *LORA, *MLP, *SHIFTED)
    shape = read_shape(recipe.model.hf)
    convert_megatron_to_hf(trained, tmp_path / "hf", 3)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    base = huggingface_model(recipe)
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]
        == exported(recipe)["rope_parameters"]
    )
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 90)
    ids = torch.from_numpy(tokens)[None]

    def logits(model) -> np.ndarray:
        with torch.no_grad():
            return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].numpy()

    rounded, before = logits(merged), logits(base)
    with Float64():
        expected = logits(merged.double())
    assert (
        "| LoRA | rank 3, alpha 7.0 on q, k, v, o, gate, up and down, merged; embeddings and norms"
        in (tmp_path / "hf" / "README.md").read_text()
    )
    assert inspect(trained, 3).training["adapters"] == "LoRA of rank 3, alpha 7.0, not merged here"
    (found,) = ranks.run(1, logits_of, recipe, trained, tokens)
    assert_as_exact(found[:, : shape.vocab_size], rounded, expected)
    assert np.abs(expected - before).max() > 1e-2, "the adapters changed next to nothing"


def test_evaluation_in_place_answers_as_the_export_does(ranks, trained, tmp_path):
    convert_megatron_to_hf(trained, tmp_path / "hf", 3)
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "merged")
    (expected,) = ranks.run(1, in_float64, ask_megatron, tmp_path / "merged", (1, 1), 32)
    (rounded,) = ranks.run(1, ask_megatron, tmp_path / "merged", (1, 1), 32)
    for layout in ((1, 1), (2, 1)):
        for found in ranks.run(layout[0], in_float64, ask_megatron, trained / "iter_0000003", layout, 32):
            assert_as_exact(found["whole"][0], rounded["whole"][0], expected["whole"][0])
            assert found["generated"] == expected["generated"]


def test_an_export_in_bfloat16_is_the_float32_merge_rounded_once_and_verified(trained, tmp_path):
    from safetensors.torch import load_file

    convert_megatron_to_hf(trained, tmp_path / "float32", 3)
    done = run_tool(
        "convert_megatron_to_hf",
        *("--megatron", trained, "--iteration", 3, "--out", tmp_path / "hf", "--dtype", "bfloat16", "--verify"),
        *("--workers", 2),
    )
    assert done.returncode == 0, done.stderr
    whole, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "hf"))
    assert whole.keys() == rounded.keys()
    assert not any("adapter" in name or "lora" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(value.bfloat16(), rounded[name]), name


def test_training_does_not_start_from_weights_with_adapters_beside_them(ranks, models, trained):
    for keys in ([], LORA):
        recipe = recipe_for(*models("odd-vocab"), *keys, f"model.init_from={trained}")
        with pytest.raises(AssertionError, match="holds LoRA's adapters beside the weights: merge them"):
            ranks.run(1, started, recipe)


def with_recipe(directory: Path, recipe: dict) -> None:
    """Let the manifest of a checkpoint hold another recipe."""
    kept = {key: value for key, value in read_manifest(directory).items() if key not in ("format", "crc32")}
    write_manifest(directory, **{**kept, "recipe": recipe})


def test_adapters_without_a_recipe_that_scales_them_are_refused(trained, tmp_path):
    copy = shutil.copytree(trained / "iter_0000003", tmp_path / "iter_0000003")
    with_recipe(copy, {})
    with pytest.raises(InputError, match="has no longlora"):
        convert_megatron_to_hf(copy, tmp_path / "hf")
    with_recipe(copy, {"longlora": {"rank": 4, "alpha": 16.0}})
    with pytest.raises(InputError, match=r"longlora\.rank=4"):
        convert_megatron_to_hf(copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
