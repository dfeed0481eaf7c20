"""The recipe: what a run is, as typed dataclasses, read from YAML with dotted overrides.

Every rule that can be checked before a GPU is touched is checked here (`check`): unknown keys, wrong
types and illegal combinations end in one line that names the key, the value and what would be legal.
A recipe may say `inherit: other.yaml` and then holds only what differs.  Read by all; imports
positions.py and shape.py alone.
"""

import importlib.util
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from endprompt_megatron.errors import InputError
from endprompt_megatron.positions import METHODS, WITH_PROMPT
from endprompt_megatron.shape import ModelShape, read_shape

ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "none")


@dataclass
class Model:
    hf: str = "???"  # Hugging Face directory: the shape, the tokenizer, the config to export
    init_from: str | None = None  # Megatron checkpoint directory that training starts from


@dataclass
class Rope:
    type: str = "linear"
    factor: float | None = None  # interpolation factor s; default target / original


@dataclass
class Context:
    method: str = "end_prompt"
    original: int | None = None  # the model's own window; default max_position_embeddings
    target: int = 65536
    physical: int = 8192  # tokens of a training sequence, context segment and terminal prompt together
    prompts: list[str] = field(default_factory=lambda: ["EP_1"])
    prompt_loss_weight: float = 1.0
    chunks: int = 2  # of pose and end_prompt_pose
    rope: Rope = field(default_factory=Rope)


@dataclass
class Data:
    train: Any = None  # PREFIX, [PREFIX, ...] or {PREFIX: weight, ...}
    valid: Any = None  # the same, held out; or "99,1": the last hundredth of the documents of data.train
    packing: str = "stream"
    cache: str | None = None  # where sample indices are kept; default beside the run


@dataclass
class Parallel:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    sequence: bool = False
    recompute: str = "none"  # none, selective (core attention), full (whole layers)


@dataclass
class Train:
    global_batch_size: int = 64  # sequences
    micro_batch_size: int = 1
    steps: int | None = None
    tokens: int | None = None  # instead of steps
    seed: int = 42
    log_interval: int = 1
    valid_interval: int = 0  # steps; 0: only at the end, where data.valid is given
    valid_samples: int = 64
    virtual_distances: list[int] = field(default_factory=list)  # of the probe that runs with validation
    max_nonfinite_steps: int = 5  # in a row; then the run stops


@dataclass
class Optim:
    lr: float = 2.0e-5
    min_lr: float = 0.0
    warmup_steps: int = 20
    schedule: str = "constant"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    grad_clip: float = 1.0


@dataclass
class Precision:
    dtype: str = "bfloat16"
    fp8: str | None = None  # hybrid or e4m3
    fp8_recipe: str = "delayed"
    fp8_attention: bool = False


@dataclass
class Checkpoint:
    dir: str = "???"  # RUN or RUN/checkpoints: metrics and recipe go to RUN, iterations to RUN/checkpoints
    interval: int = 100  # steps
    keep: int = 2  # newest complete iterations kept; 0 keeps all
    asynchronous: bool = False  # `async` in YAML, a reserved word in Python


@dataclass
class Log:
    tensorboard: bool = True
    wandb: str | None = None  # project name


@dataclass
class Recipe:
    model: Model = field(default_factory=Model)
    context: Context = field(default_factory=Context)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)

    @property
    def run_dir(self) -> Path:
        """RUN: where metrics.jsonl, recipe.yaml, checkpoints/ and tensorboard/ are written."""
        directory = Path(self.checkpoint.dir)
        return directory.parent if directory.name == "checkpoints" else directory

    @property
    def tokens_per_step(self) -> int:
        """Physical tokens of a global batch."""
        return self.train.global_batch_size * self.context.physical

    def as_dict(self) -> dict:
        """Plain nested dict with the YAML names of the keys."""
        value = asdict(self)
        value["checkpoint"]["async"] = value["checkpoint"].pop("asynchronous")
        return value

    def as_yaml(self) -> str:
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.  Raises InputError; `check` does the rest.

    Defaults that depend on the model (context.original, the interpolation factor, steps from tokens) are
    filled in, so that what is returned is the recipe as resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = str(path)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), _read_yaml(Path(path), set()))
        for override in overrides:
            where = override
            key, equals, _ = override.partition("=")
            if not equals or not key:
                raise InputError(f"{override}: expected key=value, such as train.steps=100")
            # `async` is a reserved word: the dataclass field has another name.
            dotted = override.replace("checkpoint.async=", "checkpoint.asynchronous=", 1)
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([dotted]))
            # The budget is said once: an override in steps replaces one in tokens, and the other way round.
            other = {"train.steps": "tokens", "train.tokens": "steps"}.get(key)
            if other:
                merged.train[other] = None
        where = str(path)
        recipe: Recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(_explain(where, error)) from None
    _resolve(recipe, where)
    return recipe


def _read_yaml(path: Path, seen: set[Path]) -> Any:
    """Parsed YAML with `inherit` followed.  Raises InputError for a missing or broken file and for a cycle."""
    import yaml
    from omegaconf import OmegaConf

    if path.resolve() in seen:
        raise InputError(f"{path}: inherit leads back to this file; break the cycle")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not OmegaConf.is_dict(config):
        raise InputError(f"{path}: a recipe is a mapping of sections (model, context, data, ...)")
    if "async" in (config.get("checkpoint") or {}):
        config.checkpoint.asynchronous = config.checkpoint.pop("async")
    parent = config.pop("inherit", None)
    if parent is None:
        return config
    return OmegaConf.merge(_read_yaml(path.parent / parent, seen | {path.resolve()}), config)


def _explain(where: str, error: Exception) -> str:
    """One line for OmegaConf's error: the key in full, and what would be right."""
    key = getattr(error, "full_key", None) or ""
    message = str(error).splitlines()[0].strip()
    if type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
        section, _, name = key.rpartition(".")
        siblings = _field_names(section)
        return f"{where}: unknown key {key or name}; {section or 'a recipe'} takes {', '.join(siblings)}"
    if type(error).__name__ == "MissingMandatoryValue":
        return f"{where}: {key or 'a key'} is missing"
    return f"{where}: {key}: {message}"


def _field_names(section: str) -> list[str]:
    node: Any = Recipe()
    for name in filter(None, section.split(".")):
        node = getattr(node, name, None)
    names = [f.name for f in fields(node)] if hasattr(node, "__dataclass_fields__") else []
    return ["async" if name == "asynchronous" else name for name in names]


def _resolve(recipe: Recipe, where: str) -> None:
    """Fill in the defaults that follow from other keys, after checking the keys that stand alone."""
    context, train = recipe.context, recipe.train
    for key in ("model.hf", "checkpoint.dir"):
        section, name = key.split(".")
        if getattr(getattr(recipe, section), name) in ("???", ""):
            raise InputError(f"{where}: {key} is missing")
    _one_of(where, "context.method", context.method, METHODS)
    _one_of(where, "context.rope.type", context.rope.type, ROPE_TYPES)
    for key, value in _positive(recipe):
        if value is not None and value <= 0:
            raise InputError(f"{where}: {key}={value} should be positive")
    if context.original is None and Path(recipe.model.hf).is_dir():
        context.original = read_shape(recipe.model.hf).window
    if context.rope.factor is None and context.original is not None:
        context.rope.factor = context.target / context.original
    from_tokens = math.ceil(train.tokens / recipe.tokens_per_step) if train.tokens is not None else None
    if train.steps is None and from_tokens is None:
        raise InputError(f"{where}: train.steps is missing; give it, or train.tokens")
    if None not in (train.steps, from_tokens) and train.steps != from_tokens:
        raise InputError(
            f"{where}: train.steps={train.steps} contradicts train.tokens={train.tokens} ({from_tokens} steps); give one"
        )
    train.steps = train.steps or from_tokens


def _positive(recipe: Recipe) -> list[tuple[str, Any]]:
    keys = (
        "context.original context.target context.physical context.chunks context.rope.factor parallel.tensor "
        "parallel.pipeline parallel.virtual_pipeline parallel.context train.global_batch_size train.micro_batch_size "
        "train.steps train.tokens train.log_interval train.valid_samples train.max_nonfinite_steps optim.lr optim.eps "
        "checkpoint.interval"
    ).split()
    pairs = []
    for key in keys:
        value: Any = recipe
        for name in key.split("."):
            value = getattr(value, name)
        pairs.append((key, value))
    return pairs


def _one_of(where: str, key: str, value: Any, legal: tuple) -> None:
    if value not in legal:
        raise InputError(f"{where}: {key}={value} should be one of {', '.join(map(str, legal))}")


def check(recipe: Recipe, where: str, *, world_size: int, base_config: dict | None = None) -> ModelShape:
    """Refuse what cannot work, before anything is built; returns the model's shape.

    `world_size` is the number of processes; `base_config` the parsed HF config (read from model.hf if None).
    Raises InputError.
    """
    shape = read_shape(recipe.model.hf)
    _check_context(recipe, where, shape)
    _check_layout(recipe, where, shape, world_size)
    _check_training(recipe, where)
    _check_precision(recipe, where)
    return shape


def _check_context(recipe: Recipe, where: str, shape: ModelShape) -> None:
    c = recipe.context
    if c.target <= c.original:
        raise InputError(
            f"{where}: context.target={c.target} is not above context.original={c.original}; there is nothing to extend"
        )
    if c.physical > c.target:
        raise InputError(
            f"{where}: context.physical={c.physical} is longer than context.target={c.target}; use at most the target"
        )
    if c.method == "full" and c.physical != c.target:
        raise InputError(
            f"{where}: context.method=full trains at full length: context.physical={c.physical} should be {c.target}"
        )
    if c.method in WITH_PROMPT and not c.prompts:
        raise InputError(f"{where}: context.prompts is empty; {c.method} needs at least one, such as [EP_1]")
    if c.prompt_loss_weight < 0 or (c.method in WITH_PROMPT and c.prompt_loss_weight == 0):
        raise InputError(f"{where}: context.prompt_loss_weight={c.prompt_loss_weight} should be above 0")
    if c.rope.type not in ("none",) and c.rope.factor < 1:
        raise InputError(f"{where}: context.rope.factor={c.rope.factor} should be at least 1 (target / original)")
    if c.method in ("pose", "end_prompt_pose") and c.chunks < 2:
        raise InputError(f"{where}: context.chunks={c.chunks} should be at least 2 for {c.method}")
    if shape.head_dim % 2:
        raise InputError(f"{where}: head_dim={shape.head_dim} of {recipe.model.hf} is odd; RoPE needs pairs")


def _divisors(*numbers: int) -> str:
    return ", ".join(str(d) for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers))


def _check_layout(recipe: Recipe, where: str, shape: ModelShape, world_size: int) -> None:
    p, c = recipe.parallel, recipe.context
    name = Path(recipe.model.hf).name
    for what, count in (("num_key_value_heads", shape.num_kv_heads), ("num_attention_heads", shape.num_heads)):
        if count % p.tensor:
            legal = _divisors(shape.num_kv_heads, shape.num_heads, shape.ffn_size)
            raise InputError(f"{where}: parallel.tensor={p.tensor} does not divide {what}={count} ({name}): use {legal}")
    if shape.ffn_size % p.tensor:
        raise InputError(
            f"{where}: parallel.tensor={p.tensor} does not divide intermediate_size={shape.ffn_size} ({name})"
        )
    if shape.num_layers % p.pipeline:
        raise InputError(
            f"{where}: parallel.pipeline={p.pipeline} does not divide num_hidden_layers={shape.num_layers} ({name}): "
            f"use {_divisors(shape.num_layers)}"
        )
    if p.virtual_pipeline is not None and p.virtual_pipeline > 1:
        if p.pipeline == 1:
            raise InputError(f"{where}: parallel.virtual_pipeline={p.virtual_pipeline} needs parallel.pipeline above 1")
        if (shape.num_layers // p.pipeline) % p.virtual_pipeline:
            raise InputError(
                f"{where}: parallel.virtual_pipeline={p.virtual_pipeline} does not divide the "
                f"{shape.num_layers // p.pipeline} layers of a pipeline stage: use {_divisors(shape.num_layers // p.pipeline)}"
            )
    if p.sequence and p.tensor == 1:
        raise InputError(f"{where}: parallel.sequence=true needs parallel.tensor above 1")
    if p.sequence and c.physical % (p.tensor * p.context):
        raise InputError(
            f"{where}: parallel.sequence splits context.physical={c.physical} by parallel.tensor={p.tensor}, "
            "which does not divide it"
        )
    if p.context > 1 and c.physical % (2 * p.context):
        raise InputError(
            f"{where}: context.physical={c.physical} should be a multiple of 2 x parallel.context={2 * p.context}"
        )
    if p.context > 1 and not has_transformer_engine():
        raise InputError(
            f"{where}: parallel.context={p.context} needs Transformer Engine, which is not installed: use 1"
        )
    _one_of(where, "parallel.recompute", p.recompute, ("none", "selective", "full"))
    ranks = p.tensor * p.pipeline * p.context
    if world_size % ranks:
        raise InputError(
            f"{where}: parallel.tensor x pipeline x context = {ranks} does not divide the {world_size} processes started: "
            f"start a multiple of {ranks}"
        )
    replicas = world_size // ranks
    micro, batch = recipe.train.micro_batch_size, recipe.train.global_batch_size
    if batch % (micro * replicas):
        raise InputError(
            f"{where}: train.global_batch_size={batch} is not a multiple of micro_batch_size x data parallel = "
            f"{micro} x {replicas}"
        )
    if p.virtual_pipeline and p.virtual_pipeline > 1 and (batch // (micro * replicas)) % p.pipeline:
        raise InputError(
            f"{where}: with parallel.virtual_pipeline the {batch // (micro * replicas)} micro-batches of a step should be "
            f"a multiple of parallel.pipeline={p.pipeline}"
        )


def _check_training(recipe: Recipe, where: str) -> None:
    t, o, d = recipe.train, recipe.optim, recipe.data
    _one_of(where, "optim.schedule", o.schedule, ("constant", "cosine"))
    if o.warmup_steps < 0 or (o.warmup_steps and o.warmup_steps >= t.steps):
        raise InputError(f"{where}: optim.warmup_steps={o.warmup_steps} should be at least 0 and below {t.steps} steps")
    if len(o.betas) != 2 or not all(0 <= beta < 1 for beta in o.betas):
        raise InputError(f"{where}: optim.betas={list(o.betas)} should be two numbers in [0, 1)")
    for key, value in (("weight_decay", o.weight_decay), ("min_lr", o.min_lr), ("grad_clip", o.grad_clip)):
        if value < 0:
            raise InputError(f"{where}: optim.{key}={value} should be at least 0")
    if d.packing == "documents":
        raise InputError(f"{where}: data.packing=documents is not available yet: use stream")
    _one_of(where, "data.packing", d.packing, ("stream",))
    if not d.train:
        raise InputError(f"{where}: data.train is missing; give the PREFIX that tools/prepare_data.py wrote")
    for key, wants in (("valid_interval", t.valid_interval > 0), ("virtual_distances", bool(t.virtual_distances))):
        if wants and d.valid is None:
            raise InputError(f"{where}: train.{key} needs data.valid: give a held-out PREFIX, or a split such as 99,1")
    c = recipe.context
    for distance in t.virtual_distances:
        if not c.physical <= distance <= c.target:
            raise InputError(
                f"{where}: train.virtual_distances={distance} should lie between context.physical={c.physical} and "
                f"context.target={c.target}"
            )


def _check_precision(recipe: Recipe, where: str) -> None:
    p = recipe.precision
    _one_of(where, "precision.dtype", p.dtype, ("bfloat16", "float32"))
    if p.fp8 is not None:
        _one_of(where, "precision.fp8", p.fp8, ("hybrid", "e4m3"))
        _one_of(where, "precision.fp8_recipe", p.fp8_recipe, ("delayed", "tensorwise", "blockwise", "mxfp8"))
        if not has_transformer_engine():
            raise InputError(
                f"{where}: precision.fp8={p.fp8} needs Transformer Engine, which is not installed: use null"
            )
    if p.fp8_attention and p.fp8 is None:
        raise InputError(f"{where}: precision.fp8_attention=true needs precision.fp8, such as hybrid")


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported (it is not imported here)."""
    return importlib.util.find_spec("transformer_engine") is not None
