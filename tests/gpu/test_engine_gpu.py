"""Transformer Engine's kernels against each other and against torch's: attention, RoPE, FP8, context parallelism."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
from parallel.cases import build, losses_and_gradients, make_packed, make_samples, micro_batches, recipe_for
from parallel.ranks import Ranks

from endprompt_megatron.model.shape import read_shape

STEPS = 50
LONG = ["context.physical=256", "context.target=1024"]  # FP8 wants multiples of 128, longer than a BF16 tile
FP8 = {
    "delayed": ["precision.fp8=hybrid"],
    "tensorwise": ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"],
    "blockwise": ["precision.fp8=hybrid", "precision.fp8_recipe=blockwise"],
    "delayed-attention": ["precision.fp8=hybrid", "precision.fp8_attention=true"],
    "tensorwise-attention": [
        "precision.fp8=hybrid",
        "precision.fp8_recipe=tensorwise",
        "precision.fp8_attention=true",
    ],
    "tensorwise-edges": ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise", "precision.bf16_edge_layers=1"],
}


def without_engine(recipe, samples):
    """On a rank: `losses_and_gradients` by torch's attention and norm, although TE is installed."""
    with mock.patch("endprompt_megatron.model.llama.has_transformer_engine", return_value=False):
        return losses_and_gradients(recipe, samples)


def with_fields(recipe, samples, **fields):
    """On a rank: `losses_and_gradients` of a model whose TransformerConfig has these fields changed."""
    from endprompt_megatron.model import llama

    original = llama.transformer_config

    def config(*args, **options):
        made = original(*args, **options)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    with mock.patch.object(llama, "transformer_config", config):
        return losses_and_gradients(recipe, samples)


def with_fused_loss(recipe, samples, implementation: str) -> dict:
    """On a rank: the same with Megatron's choice of losses, of which one is Transformer Engine's."""
    from megatron.core.models.gpt import GPTModel

    from endprompt_megatron.model.llama import LlamaModel

    with mock.patch.object(LlamaModel, "compute_language_model_loss", GPTModel.compute_language_model_loss):
        fields = dict(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl=implementation)
        return with_fields(recipe, samples, **fields)


def fifty_steps(recipe, samples) -> tuple[list[float], list[float]]:
    """On a rank: the losses and gradient norms of 50 AdamW steps over the same samples."""
    from endprompt_megatron.distributed import te
    from endprompt_megatron.distributed.hardware import here

    te.set_environment(recipe, "test", here())
    from endprompt_megatron.training.optimizer import update, zero_grad
    from endprompt_megatron.training.step import run_batch

    _, models, optimizer, scheduler = build(recipe)
    batches = micro_batches(recipe, samples)
    # Delayed scaling begins with a scale of 1, in which most of the first gradients are lost: a step that is not made.
    run_batch(models, batches, backward=True)
    losses, norms = [], []
    for _ in range(STEPS):
        zero_grad(models, optimizer)
        found = run_batch(models, batches, backward=True)
        norm, _ = update(optimizer, found.total, recipe.optim.grad_clip)
        scheduler.step(increment=1)
        losses.append(found.total)
        norms.append(norm)
    return losses, norms


def compare(first: dict, second: dict) -> tuple[float, float]:
    """Relative difference of the losses, and the largest of the gradients."""
    loss = abs(first["losses"].total / second["losses"].total - 1)
    assert set(first["parts"]) == set(second["parts"])
    worst = max(
        np.linalg.norm(first["parts"][name] - part) / np.linalg.norm(part) for name, part in second["parts"].items()
    )
    return loss, worst


def setup(model, *overrides):
    recipe = recipe_for(*model, "precision.dtype=bfloat16", *LONG, *overrides)
    return recipe, make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8)


@pytest.mark.gpu
@pytest.mark.with_te
@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_transformer_engine_equals_torch_in_bfloat16(rank, model, rope):
    recipe, samples = setup(model, f"context.rope.type={rope}")
    engine = rank.run(1, losses_and_gradients, recipe, samples)[0]
    torchs = rank.run(1, without_engine, recipe, samples)[0]
    named = {_local_name(name): part for name, part in engine["parts"].items()}
    loss, gradient = compare({**engine, "parts": named}, torchs)
    assert loss < 5e-3
    assert gradient < 0.1


def _local_name(name: str) -> str:
    """TE keeps the norms with the matrices that follow them."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


@pytest.mark.gpu
@pytest.mark.with_te
@pytest.mark.parametrize("method", ["end_prompt", "end_prompt_random", "pose"])
def test_fused_rope_equals_unfused_with_positions_that_jump(rank, model, method):
    recipe, samples = setup(model, f"context.method={method}", "context.target=65536")
    fused, plain = (
        rank.run(1, partial(with_fields, apply_rope_fusion=each), recipe, samples)[0] for each in (True, False)
    )
    loss, gradient = compare(fused, plain)
    assert loss < 1e-3
    assert gradient < 0.03


@pytest.mark.gpu
@pytest.mark.with_te
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("implementation", ["te", "native"])
def test_the_loss_equals_fused_ones_with_unequal_weights(rank, model, implementation, rows):
    """The samples' prompts weigh half as much as their contexts: the gradient that comes in differs by token."""
    keys = [f"train.micro_batch_size={rows}", "context.prompt_loss_weight=0.5", "context.method=end_prompt_random"]
    recipe, samples = setup(model, *keys)  # positions by sample
    fused = rank.run(1, with_fused_loss, recipe, samples, implementation)[0]
    loss, gradient = compare(rank.run(1, losses_and_gradients, recipe, samples)[0], fused)
    assert loss < 1e-3
    assert gradient < 0.03


def with_weight_gradients_fused(recipe, samples, fused: bool) -> tuple[dict, int]:
    """Losses and gradients, and how many of a layer's weights had theirs added to the sum inside the GEMM."""
    taken = []

    def prepare(models):
        for module in models[0].modules():
            if hasattr(module, "fuse_wgrad_accumulation") and not fused:
                module.fuse_wgrad_accumulation = False
        taken.extend(models)

    found = losses_and_gradients(recipe, samples, prepare)
    return found, sum(parameter.grad_added_to_main_grad for parameter in taken[0].parameters())


@pytest.mark.gpu
@pytest.mark.with_te
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weight_gradients_summed_inside_the_gemm_equal_those_summed_after(rank, model, recompute):
    recipe, samples = setup(model, f"parallel.recompute={recompute}")
    (first, count), (second, none) = (
        rank.run(1, with_weight_gradients_fused, recipe, samples, fused)[0] for fused in (True, False)
    )
    assert (count, none) == (4 * read_shape(recipe.model.hf).num_layers, 0)
    loss, gradient = compare(first, second)
    assert loss < 1e-6
    assert gradient < 1e-2  # summed after, each micro-batch's is rounded to BF16 first


def norms_around_an_update(recipe, samples) -> tuple[float, float]:
    """On a rank: the gradient norm that an update finds, and the one that it leaves behind."""
    from endprompt_megatron.training.optimizer import update, zero_grad
    from endprompt_megatron.training.step import run_batch

    _, models, optimizer, _ = build(recipe)
    zero_grad(models, optimizer)
    losses = run_batch(models, micro_batches(recipe, samples), backward=True)
    before, made = update(optimizer, losses.total, recipe.optim.grad_clip)
    assert made
    return before, float(optimizer.get_grad_norm())


@pytest.mark.gpu
@pytest.mark.with_te
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "fp8"])
def test_gradients_are_clipped_whatever_the_moments_are_kept_in(rank, model, moments):
    recipe, samples = setup(model, f"optim.moments_dtype={moments}", "optim.grad_clip=0.01")
    before, after = rank.run(1, norms_around_an_update, recipe, samples)[0]
    assert before > 0.1
    assert after == pytest.approx(0.01, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.fp8
@pytest.mark.with_te
@pytest.mark.parametrize("case", FP8)
def test_fp8_stays_with_bfloat16_over_fifty_steps(rank, fresh_rank, model, record_property, case):
    """The tolerance is 5% of the loss at every step, and 2% of how far BF16 came at the last ten.

    Attention in FP8 is known not to: it was 3.0% (delayed) and 3.4% (tensorwise) behind on an H200, for which no recipe
    has it by default.  More than 5% would be a fault all the same.
    """
    bf16, bf16_norms = rank.run(1, fifty_steps, *setup(model, "optim.lr=1e-5"))[0]
    fp8, fp8_norms = fresh_rank.run(1, fifty_steps, *setup(model, "optim.lr=1e-5", *FP8[case]))[0]
    for name, values in (("bf16", bf16), ("fp8", fp8), ("bf16_norms", bf16_norms), ("fp8_norms", fp8_norms)):
        record_property(name, [round(value, 4) for value in values])
    assert np.isfinite(fp8).all()
    assert bf16[-1] < 0.9 * bf16[0], "nothing was learnt, so nothing is compared"
    assert np.abs(np.divide(fp8, bf16) - 1).max() < 0.05
    behind, gained = abs(np.mean(fp8[-10:]) - np.mean(bf16[-10:])) - 0.01, bf16[0] - bf16[-1]
    if "attention" in case and 0.02 * gained <= behind < 0.05 * gained:
        pytest.xfail(f"attention in FP8 is {behind / gained:.1%} of the gain behind, where 2% are allowed")
    assert behind < 0.02 * gained


@pytest.mark.gpu
@pytest.mark.two_gpus
@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_context_parallelism_on_two_gpus_equals_one(rank, model, comm):
    one, samples = setup(model)
    two, _ = setup(model, "parallel.context=2", f"parallel.context_comm={comm}")
    pool = Ranks(2, gpu=True)
    try:
        split = pool.run(2, losses_and_gradients, two, samples)[0]
    finally:
        pool.close()
    loss, gradient = compare(split, rank.run(1, losses_and_gradients, one, samples)[0])
    assert loss < 5e-3
    assert gradient < 0.1


def packed(model, *overrides):
    recipe = recipe_for(*model, "precision.dtype=bfloat16", *LONG, "data.packing=documents", *overrides)
    return recipe, make_packed(recipe, read_shape(recipe.model.hf).vocab_size, 8)[0]


@pytest.mark.gpu
@pytest.mark.with_te
@pytest.mark.parametrize("method", ["end_prompt", "end_prompt_random", "pose", "short"])
@pytest.mark.parametrize("rows", [1, 4])
def test_packed_rows_of_transformer_engine_equal_torchs(rank, model, method, rows):
    recipe, samples = packed(model, f"context.method={method}", f"train.micro_batch_size={rows}")
    engine = rank.run(1, losses_and_gradients, recipe, samples)[0]
    torchs = rank.run(1, without_engine, recipe, samples)[0]
    named = {_local_name(name): part for name, part in engine["parts"].items()}
    loss, gradient = compare({**engine, "parts": named}, torchs)
    assert loss < 5e-3
    assert gradient < 0.1


@pytest.mark.gpu
@pytest.mark.fp8
@pytest.mark.with_te
@pytest.mark.parametrize("case", ["delayed", "tensorwise", "blockwise"])
def test_packed_rows_in_fp8_stay_with_bfloat16(rank, fresh_rank, model, case):
    """Three bits of mantissa: a gradient is off by a tenth or more, a loss by little; a wrong bound by its size."""
    bf16 = rank.run(1, losses_and_gradients, *packed(model))[0]
    fp8 = fresh_rank.run(1, losses_and_gradients, *packed(model, *FP8[case]))[0]
    loss, gradient = compare(fp8, bf16)
    assert loss < 2e-2
    assert gradient < 0.4


@pytest.mark.gpu
@pytest.mark.two_gpus
@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_packed_rows_under_context_parallelism_on_two_gpus_equal_one(rank, model, comm):
    one, samples = packed(model, "data.align=4")
    two, _ = packed(model, "data.align=4", "parallel.context=2", f"parallel.context_comm={comm}")
    pool = Ranks(2, gpu=True)
    try:
        split = pool.run(2, losses_and_gradients, two, samples)[0]
    finally:
        pool.close()
    loss, gradient = compare(split, rank.run(1, losses_and_gradients, one, samples)[0])
    assert loss < 5e-3
    assert gradient < 0.1
