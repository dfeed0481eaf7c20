"""What a token costs, against a count by hand."""

from unit.test_shape import config

from endprompt_megatron.plan import flops_per_token
from endprompt_megatron.shape import shape_of


def test_flops_of_a_tiny_model_by_hand():
    shape = shape_of(config(8, 12, 2, 4, 2, 100), "config.json")
    # q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 12; two layers; the output layer 8 x 100
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 96) + 800
    # a causal token of 16 sees 8 on average: scores and values, two operations each, 4 heads of 2, two layers
    attention = 2 * (2 * 2 * 8 * 8)
    assert flops_per_token(shape, 16) == 3 * (2 * weights + attention)
