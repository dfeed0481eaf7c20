"""The shape of a LLaMA-family model, read from a Hugging Face config.json.  No torch, no Megatron.

constraints/ checks a recipe against it, llama.py builds from it, convert/ maps names with it.
"""

from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.method.rope_parameters import RopeParameters, read_rope
from endprompt_megatron.model.families import FAMILIES, Family, applies, supported

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """What the config says, under Megatron's notion of each quantity.  Sizes in elements, not bytes."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    norm_epsilon: float
    qkv_bias: bool
    proj_bias: bool  # of the attention's output
    mlp_bias: bool
    qk_norm: bool
    rope: RopeParameters

    @property
    def window(self) -> int:
        """Tokens of context that the checkpoint is made for."""
        return self.rope.window

    @property
    def parameters(self) -> int:
        """Number of parameters, tied embeddings counted once, vocabulary not padded."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + self.split_biases + 3 * self.hidden_size * self.ffn_size + self.whole_vectors
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    @property
    def untied_embeddings(self) -> bool:
        return not self.tied_embeddings

    @property
    def split_biases(self) -> int:
        """Elements of a layer's biases that tensor-parallel ranks split: those of outputs that they split."""
        qkv = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        return qkv + (2 * self.ffn_size if self.mlp_bias else 0)

    @property
    def whole_vectors(self) -> int:
        """Elements of a layer's norms and biases that every tensor-parallel rank holds complete."""
        return self.layer_norms + self.hidden_size * (self.proj_bias + self.mlp_bias)

    @property
    def layer_norms(self) -> int:
        """Elements of a layer's norms."""
        return 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm

    def padded_vocab(self, multiple: int) -> int:
        """Vocabulary rounded up so that `multiple` (a tensor-parallel size) divides it."""
        return -(-self.vocab_size // multiple) * multiple


def read_shape(directory: Path | str) -> ModelShape:
    """Shape of the model in a Hugging Face directory.  Raises InputError for what is not supported."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no such directory; expected a Hugging Face checkpoint with config.json")
    if not path.is_file() and (held := something_else(Path(directory))):
        raise InputError(f"{directory}: {held}")
    return shape_of(read_json(path, "a Hugging Face config"), str(path))


def something_else(directory: Path) -> str | None:
    """What a directory holds instead of a model in Hugging Face's format, and what to do; None if that is not known."""
    if (directory / "adapter_config.json").is_file():
        return (
            "holds a LoRA adapter without its base model; merge it into the base (PEFT's merge_and_unload), and give "
            "what save_pretrained writes"
        )
    if released := next((path for path in sorted(directory.glob("consolidated*")) if path.is_file()), None):
        return (
            f"holds the weights as their authors release them ({released.name}); get the model in Hugging Face's "
            "format, or convert it by transformers' script for its family"
        )
    if any(directory.glob("iter_*")) or (directory / "checkpoints").is_dir():
        return "holds Megatron-Core checkpoints; expected a Hugging Face directory with config.json"
    return None


def shape_of(config: dict, where: str) -> ModelShape:
    """Shape from the parsed config; `where` is named in errors.  Raises InputError."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise InputError(f"{where}: mixture of experts ({key}={config[key]}) is not supported; use a dense model")
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise InputError(
            f"{where}: model_type={config.get('model_type')} is not supported; supported are {supported()}"
        )
    config = family.complete(config)
    values = {key: config.get(key) for key in _REQUIRED}
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    # Null means what transformers takes it for.
    kv_heads = config["num_key_value_heads"]
    values["num_key_value_heads"] = kv_heads = heads if kv_heads is None else kv_heads
    values["max_position_embeddings"] = config["max_position_embeddings"]
    if config["head_dim"] is not None:
        values["head_dim"] = config["head_dim"]
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{where}: {key}={value} should be a positive integer")
    if heads % kv_heads:
        raise InputError(f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if "head_dim" not in values and hidden % heads:
        raise InputError(
            f"{where}: num_attention_heads={heads} does not divide hidden_size={hidden}, and head_dim is missing"
        )
    if config["hidden_act"] not in ("silu", "swish"):  # two names of one function
        raise InputError(f"{where}: hidden_act={config['hidden_act']} is not supported; LLaMA models use silu")
    head_dim = values.get("head_dim", hidden // heads)
    rope = read_rope(config, head_dim, where)
    _refuse_variants(config, family, rope.window, where)
    epsilon = config["rms_norm_eps"]
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or not epsilon > 0:
        raise InputError(f"{where}: rms_norm_eps={epsilon} should be a positive number")
    return ModelShape(
        family=family.model_type,
        num_layers=values["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=values["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        tied_embeddings=bool(config["tie_word_embeddings"]),
        norm_epsilon=float(epsilon),
        qkv_bias=applies(family.qkv_bias, config),
        proj_bias=applies(family.proj_bias, config),
        mlp_bias=applies(family.mlp_bias, config),
        qk_norm=family.qk_norm,
        rope=rope,
    )


def _refuse_variants(config: dict, family: Family, window: int, where: str) -> None:
    """Raise InputError for what goes by the name of a supported family and is computed in another way."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "quantization_config") if isinstance(quantised, dict) else quantised
        raise InputError(f"{where}: quantised weights ({method}) are not supported; use BF16, FP16 or FP32 weights")
    sliding = config.get("sliding_window")
    if applies(family.sliding_window, config) and sliding is not None and sliding < window:
        raise InputError(f"{where}: sliding_window={sliding} is in use and not supported; {family.without_window}")
    kinds = set(config.get("layer_types") or []) - {"full_attention"}
    if kinds:
        raise InputError(
            f"{where}: layer_types has {', '.join(sorted(map(str, kinds)))}; only full_attention is supported"
        )
