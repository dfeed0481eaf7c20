"""LongLoRA in numbers: what shifted sparse attention lets a token see, and what of a model LoRA trains.

Shared by the planner, the checkpoints and the converter.  No torch, no Megatron; the attention is in
shifted_attention.py, the adapters are in lora.py.
"""

from endprompt_megatron.config.recipe import LongLora
from endprompt_megatron.model.shape import ModelShape

ADAPTER = ".adapter."  # in the names of what LoRA adds, of modules and of checkpoints alike


def seen_tokens(longlora: LongLora, length: int) -> float:
    """Tokens that a token sees, itself left out, on average over tokens and heads: length / 2 where all is seen.

    Shifted: half of the heads have groups of length / groups, the others such groups and half a one at both ends.
    """
    if not longlora.shifted:
        return length / 2
    group = length / longlora.groups
    plain = group / 2
    shifted = ((longlora.groups - 1) * group * group / 2 + 2 * (group / 2) ** 2 / 2) / length
    return (plain + shifted) / 2


def adapter_elements(shape: ModelShape, longlora: LongLora, tensor: int = 1) -> int:
    """Elements of a layer's adapters on a tensor-parallel rank: the outer side of each is split, the inner one is not.

    Queries, keys and values have a down-projection and an up-projection each, and so have the output, gate, up, down.
    """
    queries, keys = shape.num_heads * shape.head_dim // tensor, shape.num_kv_heads * shape.head_dim // tensor
    wide = 4 * shape.hidden_size + 2 * queries + 2 * keys
    if longlora.mlp:
        wide += 3 * (shape.hidden_size + shape.ffn_size // tensor)
    return longlora.rank * wide


def trained_parameters(shape: ModelShape, longlora: LongLora) -> int:
    """Parameters that a run trains: all of the model, or adapters, embeddings and norms.  The vocabulary not padded.

    Of the embeddings that is the input's, as published; a separate output layer stays frozen.
    """
    if not longlora.rank:
        return shape.parameters
    count = shape.num_layers * adapter_elements(shape, longlora)
    if longlora.train_norms:
        count += shape.num_layers * shape.layer_norms + shape.hidden_size
    if longlora.train_embeddings:
        count += shape.vocab_size * shape.hidden_size
    return count


def output_is_trained(shape: ModelShape, longlora: LongLora) -> bool:
    """Whether the output layer has a gradient: with LoRA only where it is the embedding."""
    return not longlora.rank or (shape.tied_embeddings and longlora.train_embeddings)


def held_parameters(shape: ModelShape, longlora: LongLora) -> int:
    """Parameters of the model and of its adapters."""
    return shape.parameters + shape.num_layers * adapter_elements(shape, longlora)


def checkpoint_bytes(shape: ModelShape, longlora: LongLora, weight: int) -> int:
    """Bytes of a run's checkpoint: weights of `weight` bytes, a float32 master weight and two moments where trained.

    Without the frozen weights where `longlora` says so.

    Moments are float32 in a checkpoint whatever precision they are held in.
    """
    trained = trained_parameters(shape, longlora)
    return weight * (held_parameters(shape, longlora) if longlora.save_frozen else trained) + 12 * trained
