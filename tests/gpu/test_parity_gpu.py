"""On one GPU: loss and gradients equal Hugging Face's LLaMA in float64 on the CPU, as far as the precision goes."""

import pytest
import torch
from float64 import in_float64
from parallel.cases import losses_and_gradients, make_samples, recipe_for
from parallel.reference import errors, of_ranks, reference

from endprompt_megatron.model.shape import read_shape

CASES = {
    "one-row": [],
    "positions-by-sample": ["train.micro_batch_size=4", "context.method=end_prompt_random"],
    "yarn": ["context.rope.type=yarn"],
    "recompute": ["parallel.recompute=full"],
}


def distances(rank, model, *overrides: str) -> tuple[float, dict[str, float]]:
    """Relative error of the loss, and of each gradient (norm of the difference over the norm)."""
    recipe = recipe_for(*model, *overrides)
    shape = read_shape(recipe.model.hf)
    samples = make_samples(recipe, shape.vocab_size, 8)
    results = rank.run(1, losses_and_gradients, recipe, samples)
    found = errors(of_ranks(results, recipe)[0], in_float64(reference, recipe, samples))
    gradients = {name: error for name, error in found.items() if not name.startswith("loss")}
    return found["loss (total)"], gradients


def assert_close(found: tuple[float, dict[str, float]], loss: float, gradient: float) -> None:
    assert found[0] < loss
    too_far = {name: f"{error:.1e}" for name, error in found[1].items() if error >= gradient}
    assert not too_far


@pytest.mark.without_te
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_huggingface(rank, model, case):
    assert_close(distances(rank, model, *CASES[case]), loss=1e-5, gradient=1e-4)


@pytest.mark.with_te
@pytest.mark.parametrize("case", CASES)
def test_transformer_engine_in_float32_equals_huggingface(rank, model, case):
    """TE multiplies float32 matrices in TF32, which has 10 bits of mantissa."""
    assert_close(distances(rank, model, *CASES[case]), loss=1e-3, gradient=2e-2)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close_to_huggingface(rank, model, case):
    """A wrong phase, norm or mask is off by its whole size; BF16 by a few of its 1/256."""
    assert_close(distances(rank, model, "precision.dtype=bfloat16", *CASES[case]), loss=1e-2, gradient=0.15)


def on_the_gpu() -> tuple[str, bool]:
    from endprompt_megatron.distributed import cpu, runtime

    runtime.start(1, 1, None, 1, seed=0)
    return str(torch.zeros(1, device="cuda").device), cpu._installed


def test_nothing_is_sent_to_the_cpu_where_there_is_a_gpu(rank):
    assert rank.run(1, on_the_gpu) == [("cuda:0", False)]
