"""What a recipe costs: floating-point operations a token, from the model's shape."""

from endprompt_megatron.shape import ModelShape


def flops_per_token(shape: ModelShape, length: int) -> float:
    """Training FLOPs a token (forward and backward) of a causal sequence of `length` tokens.

    Six a weight of every matrix that a token passes (the embedding lookup is none, the output layer is),
    and for attention 12 * layers * heads * head_dim * length / 2: a token sees half the sequence on average.
    """
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    matrices = shape.num_layers * (attention + 3 * shape.hidden_size * shape.ffn_size)
    matrices += shape.vocab_size * shape.hidden_size
    scores = 6 * shape.num_layers * shape.num_heads * shape.head_dim * length
    return 6.0 * matrices + scores
