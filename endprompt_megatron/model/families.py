"""Model families: everything that differs by `model_type`, each declared once.  No torch, no Megatron.

shape.py reads a config by its family, convert/mapping.py names the weights by it, published_shapes.py knows its
published models, messages and docs/conversion.md (family_table.py) list FAMILIES.  docs/extending.md adds one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LAYERS = "decoder.layers."  # before Megatron's names of weights of which each layer has one


@dataclass(frozen=True)
class Row:
    """One Megatron weight and the Hugging Face weights it is made of, each with its shape.

    `hf` maps a name, with {} for the layer, to dimensions.  Several weights follow each other along axis 0,
    or, with `per_group`, are dealt out by KV group: [the group's query heads, its key head, its value head].
    """

    megatron: str
    hf: Mapping[str, str]
    per_group: bool = False
    only_if: str | None = None  # a property of ModelShape without which the weight does not exist

    @property
    def per_layer(self) -> bool:
        return self.megatron.startswith(LAYERS)


EMBEDDING = "embedding.word_embeddings.weight"
QKV = LAYERS + "self_attention.linear_qkv.weight"
PROJ = LAYERS + "self_attention.linear_proj.weight"
FC1, FC2 = (LAYERS + f"mlp.linear_{name}.weight" for name in ("fc1", "fc2"))
OUTPUT = "output_layer.weight"
_HF_LAYERS = "model.layers.{}."

# In the order of a Hugging Face model.  Queries, keys and values in this order.
LLAMA_ROWS = (
    Row(EMBEDDING, {"model.embed_tokens.weight": "vocab hidden"}),
    Row(
        QKV,
        {
            _HF_LAYERS + "self_attn.q_proj.weight": "q hidden",
            _HF_LAYERS + "self_attn.k_proj.weight": "kv hidden",
            _HF_LAYERS + "self_attn.v_proj.weight": "kv hidden",
        },
        per_group=True,
    ),
    Row(
        LAYERS + "self_attention.linear_qkv.bias",
        {
            _HF_LAYERS + "self_attn.q_proj.bias": "q",
            _HF_LAYERS + "self_attn.k_proj.bias": "kv",
            _HF_LAYERS + "self_attn.v_proj.bias": "kv",
        },
        per_group=True,
        only_if="qkv_bias",
    ),
    Row(
        LAYERS + "self_attention.q_layernorm.weight",
        {_HF_LAYERS + "self_attn.q_norm.weight": "head"},
        only_if="qk_norm",
    ),
    Row(
        LAYERS + "self_attention.k_layernorm.weight",
        {_HF_LAYERS + "self_attn.k_norm.weight": "head"},
        only_if="qk_norm",
    ),
    Row(PROJ, {_HF_LAYERS + "self_attn.o_proj.weight": "hidden q"}),
    Row(
        LAYERS + "self_attention.linear_proj.bias",
        {_HF_LAYERS + "self_attn.o_proj.bias": "hidden"},
        only_if="proj_bias",
    ),
    Row(
        FC1,
        {
            _HF_LAYERS + "mlp.gate_proj.weight": "ffn hidden",
            _HF_LAYERS + "mlp.up_proj.weight": "ffn hidden",
        },
    ),
    Row(
        LAYERS + "mlp.linear_fc1.bias",
        {_HF_LAYERS + "mlp.gate_proj.bias": "ffn", _HF_LAYERS + "mlp.up_proj.bias": "ffn"},
        only_if="mlp_bias",
    ),
    Row(FC2, {_HF_LAYERS + "mlp.down_proj.weight": "hidden ffn"}),
    Row(LAYERS + "mlp.linear_fc2.bias", {_HF_LAYERS + "mlp.down_proj.bias": "hidden"}, only_if="mlp_bias"),
    Row(LAYERS + "self_attention.linear_qkv.layer_norm_weight", {_HF_LAYERS + "input_layernorm.weight": "hidden"}),
    Row(LAYERS + "mlp.linear_fc1.layer_norm_weight", {_HF_LAYERS + "post_attention_layernorm.weight": "hidden"}),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),
    Row(OUTPUT, {"lm_head.weight": "vocab hidden"}, only_if="untied_embeddings"),
)

# What transformers' LlamaConfig means by a key that is left out, and most of its descendants do too.
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,  # as many as there are query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class Family:
    """Models that share a `model_type` and are computed alike.

    A bias, and the use of a sliding window, is True or False for all of the family, or the name of the config's key
    that decides.  The layers that model/llama.py builds follow from these.
    """

    model_type: str  # in config.json, and what transformers knows the family by
    models: str  # the published models that were tried, for people
    defaults: Mapping[str, Any] = field(default_factory=lambda: LLAMA_DEFAULTS)  # of keys that a config leaves out
    rows: tuple[Row, ...] = LLAMA_ROWS
    qkv_bias: bool | str = False
    proj_bias: bool | str = False  # of the attention's output
    mlp_bias: bool | str = False
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before they are rotated
    sliding_window: bool | str = False
    without_window: str = ""  # which of its models have no sliding window in use: a refusal names them
    published: Mapping[str, dict] = field(default_factory=dict)  # configs by name: published_shapes.py

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with the family's defaults where it leaves a key out."""
        return {**self.defaults, **config}

    def hf_name(self, megatron: str) -> str:
        """Hugging Face's name of the one weight that Megatron's outside of the layers is made of."""
        (name,) = next(row.hf for row in self.rows if row.megatron == megatron)
        return name


def applies(declared: bool | str, config: Mapping[str, Any]) -> bool:
    """Whether a bias or a sliding window, as a Family declares it, is there in a model with this config."""
    return bool(config.get(declared)) if isinstance(declared, str) else declared


def _config(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, window: int, **more) -> dict:
    return {
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


_LLAMA = Family(
    model_type="llama",
    models="LLaMA-2, 3, 3.1, 3.2, 3.3 and SmolLM2",
    qkv_bias="attention_bias",
    proj_bias="attention_bias",
    mlp_bias="mlp_bias",
    published={
        "llama-2-7b": _config(4096, 11008, 32, 32, 32, 32000, 4096, rope_theta=10000.0),
        "llama-3-8b": _config(4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=500000.0),
        "llama-3-70b": _config(8192, 28672, 80, 64, 8, 128256, 8192, rope_theta=500000.0),
        "llama-3.1-8b": _config(4096, 14336, 32, 32, 8, 128256, 131072, **_llama31(8.0)),
        "llama-3.1-70b": _config(8192, 28672, 80, 64, 8, 128256, 131072, **_llama31(8.0)),
        "llama-3.1-405b": _config(16384, 53248, 126, 128, 8, 128256, 131072, **_llama31(8.0)),
        "llama-3.2-1b": _config(
            2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, tie_word_embeddings=True, **_llama31(32.0)
        ),
        "smollm2-135m": _config(576, 1536, 30, 9, 3, 49152, 8192, rope_theta=100000.0, tie_word_embeddings=True),
    },
)
_MISTRAL = Family(
    model_type="mistral",
    models="Mistral-7B-v0.3",
    defaults={
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    sliding_window=True,
    without_window="Mistral-7B-v0.3 has none",
    published={
        "mistral-7b-v0.3": _config(4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1000000.0, sliding_window=None),
    },
)
_QWEN2 = Family(
    model_type="qwen2",
    models="Qwen2.5",
    defaults={
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    qkv_bias=True,
    sliding_window="use_sliding_window",
    without_window="Qwen2.5 has use_sliding_window=false",
)

_QWEN3 = Family(
    model_type="qwen3",
    models="Qwen3 (dense)",
    defaults={
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
    },
    qkv_bias="attention_bias",
    proj_bias="attention_bias",
    qk_norm=True,
    sliding_window="use_sliding_window",
    without_window="Qwen3 has use_sliding_window=false",
    published={
        "qwen3-8b": _config(
            4096, 12288, 36, 32, 8, 151936, 40960, rope_theta=1000000.0, head_dim=128, rms_norm_eps=1e-6
        ),
    },
)

FAMILIES = {family.model_type: family for family in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3)}


def supported() -> str:
    """All families, for a message."""
    return "; ".join(f"{family.model_type} ({family.models})" for family in FAMILIES.values())
