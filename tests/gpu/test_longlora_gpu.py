"""On one GPU: shifted attention and LoRA equal transformers with a dense mask and adapters made by hand."""

import pytest
from parallel.test_longlora import LORA, SHIFTED, check

CASES = {"shifted": SHIFTED, "lora": LORA, "both": [*SHIFTED, *LORA, "parallel.recompute=full"]}


@pytest.mark.without_te
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_huggingface(rank, model, case):
    check(rank, model, 1, *CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close_to_huggingface_in_float32(rank, model, case):
    """With Transformer Engine, whose norm before q, k and v is a layer of its own here, or without."""
    check(rank, model, 1, *CASES[case], "precision.dtype=bfloat16", tolerance=0.15, loss_tolerance=1e-2)
