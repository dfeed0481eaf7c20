"""On one GPU: shifted attention and LoRA equal transformers with a dense mask and adapters made by hand."""

import pytest
from parallel.cases import recipe_for
from parallel.reference import compare_roughly
from parallel.test_longlora import LORA, MLP, SHIFTED, samples_and_model

CASES = {"shifted": SHIFTED, "lora": LORA, "mlp": [*LORA, *MLP], "both": [*SHIFTED, *LORA, "parallel.recompute=full"]}


def check(rank, model, *keys, loss, gradient):
    recipe = recipe_for(*model, *keys)
    samples, how = samples_and_model(recipe)
    compare_roughly(rank, recipe, samples, loss=loss, gradient=gradient, **how)


@pytest.mark.without_te
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_huggingface(rank, model, case):
    check(rank, model, *CASES[case], loss=1e-5, gradient=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close_to_huggingface(rank, model, case):
    """With Transformer Engine, whose norms before matrices with adapters are layers of their own here, or without."""
    check(rank, model, *CASES[case], "precision.dtype=bfloat16", loss=1e-2, gradient=0.15)
