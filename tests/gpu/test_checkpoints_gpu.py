"""On a GPU, too, a run that was stopped goes on to the last bit: fused AdamW, pinned staging, FP8 state."""

import pytest
from parallel.cases import make_samples, recipe_for
from parallel.test_checkpoints import train_and_save

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


def on_a_rank(recipe, batches, root):
    from endprompt_megatron.distributed import te
    from endprompt_megatron.distributed.hardware import here

    te.set_environment(recipe, "test", here())
    return train_and_save(recipe, batches, root)


@pytest.mark.parametrize("keys", CASES)
def test_training_goes_on_to_the_last_bit(fresh_rank, model, tmp_path, keys):
    recipe = recipe_for(*model, *LONG, "checkpoint.async=true", *keys)
    batches = [make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8, seed=step) for step in range(5)]
    (whole,) = fresh_rank.run(1, on_a_rank, recipe, batches, tmp_path / "whole")
    (first,) = fresh_rank.run(1, on_a_rank, recipe, batches[:2], tmp_path / "parts")
    (second,) = fresh_rank.run(1, on_a_rank, recipe, batches[2:], tmp_path / "parts")
    assert first + second == whole


@pytest.mark.with_te
def test_moments_of_eight_bits_come_back_within_their_rounding(fresh_rank, model, tmp_path):
    """Scaled anew when they are loaded: the losses that follow agree, not to the last bit."""
    recipe = recipe_for(*model, *LONG, "optim.moments_dtype=fp8")
    batches = [make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8, seed=step) for step in range(5)]
    (whole,) = fresh_rank.run(1, on_a_rank, recipe, batches, tmp_path / "whole")
    fresh_rank.run(1, on_a_rank, recipe, batches[:2], tmp_path / "parts")
    (second,) = fresh_rank.run(1, on_a_rank, recipe, batches[2:], tmp_path / "parts")
    assert [loss for loss, _ in second] == pytest.approx([loss for loss, _ in whole[2:]], rel=1e-2)
