"""On one GPU: loss and gradients equal Hugging Face's float32 LLaMA on the CPU, as far as the precision goes."""

import importlib.util

import numpy as np
import pytest
import torch
from parallel.cases import (
    huggingface_loss,
    huggingface_model,
    join_gradients,
    losses_and_gradients,
    make_samples,
    recipe_for,
)
from parallel.ranks import Ranks
from small import small_llama

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.shape import read_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
with_te = pytest.mark.skipif(not TRANSFORMER_ENGINE, reason="needs Transformer Engine")
without_te = pytest.mark.skipif(TRANSFORMER_ENGINE, reason="Transformer Engine is installed and takes the layers")
CASES = {
    "one-row": [],
    "positions-by-sample": ["train.micro_batch_size=4", "context.method=end_prompt_random"],
    "yarn": ["context.rope.type=yarn"],
    "recompute": ["parallel.recompute=full"],
}


@pytest.fixture(scope="module")
def rank():
    pool = Ranks(1, gpu=True)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Head dimension 128, as LLaMA 7B to 405B have it and TE's fused attention wants it."""
    directory = tmp_path_factory.mktemp("gpu")
    small_llama(directory / "hf", hidden_size=256, intermediate_size=512, num_attention_heads=2, num_key_value_heads=1)
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    return directory, directory / "hf", directory / "megatron"


def errors(rank, model, *overrides: str) -> tuple[float, dict[str, float]]:
    """Relative error of the loss, and of each gradient (norm of the difference over the norm)."""
    recipe = recipe_for(*model, *overrides)
    shape = read_shape(recipe.model.hf)
    samples = make_samples(recipe, shape.vocab_size, 8)
    results = rank.run(1, losses_and_gradients, recipe, samples)
    reference = huggingface_model(recipe)
    total, _, _ = huggingface_loss(reference, samples)
    total.backward()
    gradients = join_gradients(results, shape)
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert set(gradients) == set(expected)
    found = {
        name: float(np.linalg.norm(gradients[name] - value) / np.linalg.norm(value)) for name, value in expected.items()
    }
    return abs(results[0]["losses"].total / total.item() - 1), found


def assert_close(found: tuple[float, dict[str, float]], loss: float, gradient: float) -> None:
    assert found[0] < loss
    too_far = {name: f"{error:.1e}" for name, error in found[1].items() if error >= gradient}
    assert not too_far


@without_te
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_huggingface(rank, model, case):
    assert_close(errors(rank, model, *CASES[case]), loss=1e-5, gradient=1e-4)


@with_te
@pytest.mark.parametrize("case", CASES)
def test_transformer_engine_in_float32_equals_huggingface(rank, model, case):
    """TE multiplies float32 matrices in TF32, which has 10 bits of mantissa."""
    assert_close(errors(rank, model, *CASES[case]), loss=1e-3, gradient=2e-2)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close_to_huggingface_in_float32(rank, model, case):
    """A wrong phase, norm or mask is off by its whole size; BF16 by a few of its 1/256."""
    assert_close(errors(rank, model, "precision.dtype=bfloat16", *CASES[case]), loss=1e-2, gradient=0.15)


def on_the_gpu() -> tuple[str, bool]:
    from endprompt_megatron import cpu, runtime

    runtime.start(1, 1, None, 1, seed=0)
    return str(torch.zeros(1, device="cuda").device), cpu._installed


def test_nothing_is_sent_to_the_cpu_where_there_is_a_gpu(rank):
    assert rank.run(1, on_the_gpu) == [("cuda:0", False)]
