"""Shapes of published models, for a plan made where their files are not: the configs' values, by name.

What config.json of the published checkpoint says, as far as shape.shape_of reads it.  A plan says when it
took a shape from here; training never does.
"""

import re
from pathlib import Path, PurePath

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.model.shape import ModelShape, read_shape, shape_of


def _config(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, window: int, **more) -> dict:
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": window,
        **more,
    }


def _llama31(factor: float) -> dict:
    """The scaling that LLaMA-3.1 and 3.2 were published with."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_theta": 500000.0, "rope_scaling": scaling | {"original_max_position_embeddings": 8192}}


# Name: the last part of the hub's name, without a maker's prefix.
CONFIGS = {
    "llama-2-7b": _config(4096, 11008, 32, 32, 32, 32000, 4096, rope_theta=10000.0),
    "llama-3-8b": _config(4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=500000.0),
    "llama-3-70b": _config(8192, 28672, 80, 64, 8, 128256, 8192, rope_theta=500000.0),
    "llama-3.1-8b": _config(4096, 14336, 32, 32, 8, 128256, 131072, **_llama31(8.0)),
    "llama-3.1-70b": _config(8192, 28672, 80, 64, 8, 128256, 131072, **_llama31(8.0)),
    "llama-3.1-405b": _config(16384, 53248, 126, 128, 8, 128256, 131072, **_llama31(8.0)),
    "llama-3.2-1b": _config(
        2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, tie_word_embeddings=True, **_llama31(32.0)
    ),
    "mistral-7b-v0.3": _config(
        4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1000000.0, model_type="mistral", sliding_window=None
    ),
    "smollm2-135m": _config(576, 1536, 30, 9, 3, 49152, 8192, rope_theta=100000.0, tie_word_embeddings=True),
}
_MAKERS = ("meta-", "meta_", "huggingfacetb-", "mistralai-")
_ENDINGS = ("-hf", "-instruct", "-chat", "-base")


def published_config(name: str) -> dict | None:
    """The config of the published model that `name` (a directory, a hub's name) is called after, or None.

    Upper and lower case, `Meta-` before and `-hf` or `-Instruct` after the name, and the dash after Llama
    make no difference: Llama-2-7b-hf, Meta-Llama-3-8B, Llama3.1-70B-Instruct.  `-64k` at its end stands for a
    model that was extended to that window.
    """
    plain = plain_name(name)
    extended = re.fullmatch(r"(.+)-(\d+)k", plain)
    if extended:
        base = published_config(extended.group(1))
        return base and {**base, "max_position_embeddings": 1024 * int(extended.group(2))}
    return CONFIGS.get("mistral-7b-v0.3" if plain == "mistral-7b-instruct-v0.3" else plain)


def plain_name(name: str) -> str:
    """A model's name without its maker and ending, in small letters: llama-3-8b for Meta-Llama-3-8B-Instruct."""
    plain = PurePath(name).name.lower().replace("_", "-").replace(" ", "-")
    for maker in _MAKERS:
        plain = plain.removeprefix(maker)
    for _ in _ENDINGS:
        for ending in _ENDINGS:
            plain = plain.removesuffix(ending)
    if plain.startswith("llama") and not plain.startswith("llama-"):
        plain = "llama-" + plain.removeprefix("llama")
    return plain


def shape_for(hf: str, where: str) -> tuple[ModelShape, bool]:
    """Shape of the model that model.hf names, and whether it is the published one because the directory is not here.

    Raises InputError where there is neither a directory nor a published model of that name.
    """
    directory = Path(hf)
    config = published_config(hf)
    try:
        return read_shape(directory), False
    except InputError:
        if directory.exists():  # it is there and wrong: say that
            raise
    if config is None:
        known = ", ".join(sorted(CONFIGS))
        raise InputError(
            f"{where}: model.hf={hf}: no such directory, and no published model of that name; "
            f"published shapes are {known}"
        )
    return shape_of(config, hf), True
