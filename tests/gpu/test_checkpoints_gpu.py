"""On a GPU, too, a run that was stopped goes on to the last bit: fused AdamW, pinned staging, FP8 state."""

import pytest
from parallel.cases import make_samples, recipe_for

from endprompt_megatron.model.shape import read_shape

LONG = ["context.physical=256", "context.target=1024", "precision.dtype=bfloat16"]
TE = [pytest.mark.with_te]
FP8 = [pytest.mark.with_te, pytest.mark.fp8]
CASES = [
    pytest.param(["checkpoint.async=false"], id="sync"),
    pytest.param([], id="async"),
    pytest.param(["optim.moments_dtype=bfloat16"], marks=TE, id="bfloat16-moments"),
    pytest.param(["precision.fp8=hybrid"], marks=FP8, id="delayed-scaling"),
    pytest.param(
        ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise", "optim.moments_dtype=bfloat16"],
        marks=FP8,
        id="tensorwise-bfloat16-moments",
    ),
]


def on_a_rank(recipe, batches, root, look=None):
    from endprompt_megatron.distributed import environment, runtime, te
    from endprompt_megatron.distributed.hardware import here

    environment.set_before_cuda(recipe, "test")
    te.set_environment(recipe, "test", here())
    if recipe.train.deterministic:
        runtime.repeat_exactly()
    # Behind that: it imports Megatron, and with it Transformer Engine, which reads its variables then.
    from parallel.test_checkpoints import train_and_save

    return train_and_save(recipe, batches, root, look)


def whole_and_in_parts(rank, recipe, root) -> tuple[list, list]:
    """(loss, gradient norm) of five steps, and of two and three with a checkpoint between them."""
    batches = [make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8, seed=step) for step in range(5)]
    (whole,) = rank.run(1, on_a_rank, recipe, batches, root / "whole")
    (first,) = rank.run(1, on_a_rank, recipe, batches[:2], root / "parts")
    (second,) = rank.run(1, on_a_rank, recipe, batches[2:], root / "parts")
    return whole, first + second


@pytest.mark.parametrize("keys", CASES)
def test_training_goes_on_to_the_last_bit(fresh_rank, model, tmp_path, keys):
    recipe = recipe_for(*model, *LONG, "checkpoint.async=true", *keys)
    whole, parts = whole_and_in_parts(fresh_rank, recipe, tmp_path)
    assert parts == whole


FAR = ["context.physical=4096", "context.target=16384", "precision.dtype=bfloat16"]


@pytest.mark.parametrize(
    "keys", [pytest.param([], id="bfloat16"), pytest.param(["precision.fp8=hybrid"], marks=FP8, id="delayed-scaling")]
)
def test_at_4096_tokens_it_goes_on_to_the_last_bit_if_the_recipe_asks_for_that(fresh_rank, model, tmp_path, keys):
    recipe = recipe_for(*model, *FAR, "train.deterministic=true", *keys)
    whole, parts = whole_and_in_parts(fresh_rank, recipe, tmp_path)
    assert parts == whole


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([], id="bfloat16"),
        pytest.param(["precision.fp8=hybrid", "precision.fp8_attention=true"], marks=FP8, id="delayed-attention"),
    ],
)
def test_at_4096_tokens_it_goes_on_within_rounding_without_being_asked(fresh_rank, model, tmp_path, keys):
    whole, parts = whole_and_in_parts(fresh_rank, recipe_for(*model, *FAR, *keys), tmp_path)
    assert [loss for loss, _ in parts] == pytest.approx([loss for loss, _ in whole], rel=2e-3)


def scales_of_attention(recipe, batches, root) -> list[dict]:
    """On a rank: the scales of attention in FP8, forward and backward, before the first update and after the last."""
    seen = []

    def look(models):
        found = {}
        for name, module in models[0].named_modules():
            for key in ("scaling_fwd", "scaling_bwd"):
                if name.endswith("core_attention") and key in module.fp8_meta:
                    found[f"{name}.{key}"] = module.fp8_meta[key].scale.tolist()
        seen.append(found)

    on_a_rank(recipe, batches, root, look)
    return seen


@pytest.mark.with_te
@pytest.mark.fp8
@pytest.mark.parametrize("kind", ["delayed", "tensorwise"])
def test_scales_of_attention_in_fp8_come_back(fresh_rank, model, tmp_path, kind):
    recipe = recipe_for(
        *model, *LONG, "precision.fp8=hybrid", f"precision.fp8_recipe={kind}", "precision.fp8_attention=true"
    )
    batches = [make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8, seed=step) for step in range(4)]
    ((_, left),) = fresh_rank.run(1, scales_of_attention, recipe, batches[:3], tmp_path / "run")
    ((found, _),) = fresh_rank.run(1, scales_of_attention, recipe, batches[3:], tmp_path / "run")
    assert len(left) == 2 * read_shape(recipe.model.hf).num_layers
    assert any(scale != 1 for scales in left.values() for scale in scales)
    assert found == left


@pytest.mark.with_te
def test_moments_of_eight_bits_come_back_within_their_rounding(fresh_rank, model, tmp_path):
    """Scaled anew when they are loaded: the losses that follow agree, not to the last bit."""
    recipe = recipe_for(*model, *LONG, "optim.moments_dtype=fp8")
    batches = [make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8, seed=step) for step in range(5)]
    (whole,) = fresh_rank.run(1, on_a_rank, recipe, batches, tmp_path / "whole")
    fresh_rank.run(1, on_a_rank, recipe, batches[:2], tmp_path / "parts")
    (second,) = fresh_rank.run(1, on_a_rank, recipe, batches[2:], tmp_path / "parts")
    assert [loss for loss, _ in second] == pytest.approx([loss for loss, _ in whole[2:]], rel=1e-2)
