"""What a token costs, against a count by hand and the published figures."""

import pytest
from unit.test_shape import MODELS, config

from endprompt_megatron.plan import flops_per_token
from endprompt_megatron.shape import shape_of


def test_flops_of_a_tiny_model_by_hand():
    shape = shape_of(config(8, 12, 2, 4, 2, 100), "config.json")
    # q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 12; two layers; the output layer 8 x 100
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 96) + 800
    # a causal token of 16 sees 8 on average: scores and values, two operations each, 4 heads of 2, two layers
    attention = 2 * (2 * 2 * 8 * 8)
    assert flops_per_token(shape, 16) == 3 * (2 * weights + attention)


@pytest.mark.parametrize(("length", "gflop"), [(8192, 51.5), (65536, 96.6)])
def test_flops_of_llama3_8b_agree_with_the_published(length, gflop):
    """NVIDIA's 744 TFLOP/s at 14,451 tokens/s and length 8192 is 51.5 GFLOP a token."""
    shape = shape_of(MODELS["LLaMA-3-8B"][0], "config.json")
    assert flops_per_token(shape, length) / 1e9 == pytest.approx(gflop, abs=0.05)


def test_tied_embeddings_cost_the_output_layer_all_the_same():
    untied = shape_of(config(8, 12, 2, 4, 2, 100), "config.json")
    tied = shape_of(config(8, 12, 2, 4, 2, 100, tie_word_embeddings=True), "config.json")
    assert flops_per_token(tied, 16) == flops_per_token(untied, 16)
