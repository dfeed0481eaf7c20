"""Training FLOPs a token: what TFLOP/s in metrics.jsonl and the planner's times are stated in.  No torch."""

from endprompt_megatron.config.recipe import LongLora
from endprompt_megatron.model.longlora import adapter_elements, output_is_trained, seen_tokens
from endprompt_megatron.model.shape import ModelShape


def flops_per_token(shape: ModelShape, length: int, longlora: LongLora | None = None) -> float:
    """Training FLOPs a token (forward and backward) of a causal sequence of `length` tokens.

    Six a weight of every matrix that a token passes (the embedding lookup is none, the output layer is), four of
    one that LoRA leaves frozen, and for attention 12 * layers * heads * head_dim a token seen: half the sequence on
    average, fewer where it is shifted.
    """
    longlora = longlora or LongLora()
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    matrices = shape.num_layers * (attention + 3 * shape.hidden_size * shape.ffn_size)
    output = shape.vocab_size * shape.hidden_size
    scores = 12 * shape.num_layers * shape.num_heads * shape.head_dim * seen_tokens(longlora, length)
    if not longlora.rank:
        return 6.0 * (matrices + output) + scores
    adapters = shape.num_layers * adapter_elements(shape, longlora)
    return 4.0 * matrices + 6.0 * adapters + (6 if output_is_trained(shape, longlora) else 4) * output + scores
