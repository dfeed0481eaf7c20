"""The recipe: what a run is, as typed dataclasses, read from YAML with dotted overrides.

Unknown keys, wrong types and values that can never be right end in one line that names the key, the value
and what would be legal; rules/ does the same for what depends on the model and the number of processes.
A recipe may say `inherit: other.yaml` and then holds only what differs.  Read by all; imports
positions.py and shape.py alone.
"""

import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.method.positions import METHODS
from endprompt_megatron.model.shape import read_shape

ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "none", "keep")


@dataclass
class Model:
    hf: str = "???"  # Hugging Face directory: the shape, the tokenizer, the config to export
    init_from: str | None = None  # what training starts from: a Megatron checkpoint, or a Hugging Face directory


@dataclass
class Rope:
    type: str = "linear"
    factor: float | None = None  # interpolation factor s; default target / original


@dataclass
class Recall:
    """The terminal prompt asks for a span of its own context: data/recall.py."""

    tokens: int = 0  # of the span; 0: no recall prompts
    cue: str = "Recall the passage of the text above that begins with these words:"
    key: int = 8  # first tokens of the span: they say which one it is and have no weight in the loss
    share: float = 1.0  # of the samples; the others end with one of context.prompts


@dataclass
class Context:
    method: str = "end_prompt"
    original: int | None = None  # the model's own window; default max_position_embeddings
    target: int = 65536
    physical: int = 8192  # tokens of a training sequence, context segment and terminal prompt together
    prompts: list[str] = field(default_factory=lambda: ["EP_1"])
    prompt_loss_weight: float = 1.0
    chunks: int = 2  # of pose and end_prompt_pose
    anchors: int = 4  # of end_prompt_multi: copies of the prompt in a sequence
    curriculum_samples: int | None = None  # of end_prompt_curriculum: after so many samples it has arrived at the end
    recall: Recall = field(default_factory=Recall)
    content_skip: bool = False  # of pose: the chunks come from different places of a document, as published
    rope: Rope = field(default_factory=Rope)

    @property
    def knobs(self) -> dict[str, int]:
        """What positions.position_ids takes beside method, lengths, index and seed."""
        return {
            "chunks": self.chunks,
            "anchors": self.anchors,
            "curriculum_samples": self.curriculum_samples or 0,
        }


@dataclass
class Data:
    train: Any = None  # PREFIX, [PREFIX, ...], {PREFIX: weight, ...} or {PREFIX: {weight: ..., prompts: [...]}, ...}
    valid: Any = None  # the same, held out; or "99,1": the last hundredth of the documents of data.train
    kind: str = "text"  # or chat: conversations (tools/prepare_data.py --chat), with a loss on the answers alone
    long: str | None = None  # of chat: conversations longer than context.physical are left out (drop, default) or cut
    packing: str = "stream"  # or documents: each a sample of its own, packed into rows of context.physical
    document_ends: str = "cross"  # context segments cross the ends of documents, or each lies within one: within
    min_document_tokens: int = 0  # shorter documents are left out
    align: int | None = None  # packed samples are padded to multiples of it; default 2 x parallel.context, or 1
    cache: str | None = None  # where sample indices are kept; default beside the run


@dataclass
class Parallel:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    count_embedding: bool = False  # as a layer, in the pipeline split: (layers + 1 or 2) / stages each
    count_loss: bool = False
    context: int = 1
    context_comm: str = "p2p"  # how key and value travel: p2p (a ring), all_gather, a2a (heads for sequence)
    sequence: bool = False
    recompute: str = "none"  # none, selective (core attention), block (some layers a stage), full (all layers)
    recompute_layers: int | None = None  # of block: layers of each (virtual) stage; of full: layers a unit, 1
    overlap_grad_reduce: bool | None = None  # default: on GPUs with several data-parallel ranks
    overlap_param_gather: bool | None = None  # the same
    overlap_tensor: bool = False  # tensor-parallel communication under the GEMMs; Transformer Engine's user buffers


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
    gc_interval: int = 100  # steps between collections of Python's garbage, on all ranks at once; 0: Python's own
    straggler_interval: int = 100  # steps between reports of slow ranks; 0: none
    watchdog_factor: float = 10.0  # a step that takes so many medians ends the run with every rank's stack; 0: none
    watchdog_floor_s: float = 60.0  # seconds that a step may always take; 30 times as many at the start and between


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
    moments_dtype: str = "float32"  # of AdamW's two moments: float32, bfloat16, fp8 (the last two need TE)


@dataclass
class Precision:
    dtype: str = "bfloat16"
    fp8: str | None = None  # hybrid (E4M3, gradients E5M2) or e4m3
    fp8_recipe: str = "delayed"  # delayed, tensorwise (current scaling), blockwise, mxfp8
    fp8_attention: bool = False
    bf16_edge_layers: int = 0  # this many first and this many last layers stay in BF16
    grad_reduce: str = "float32"  # or bfloat16: half the traffic between data-parallel ranks


@dataclass
class LongLora:
    shifted: bool = False  # shifted sparse attention in training; validation and inference see everything
    groups: int = 4  # of a sequence
    rank: int = 0  # of LoRA on q, k, v and o; 0: every parameter is trained
    alpha: float = 16.0  # LoRA adds alpha / rank times its product
    train_embeddings: bool = True  # beside LoRA
    train_norms: bool = True


@dataclass
class Checkpoint:
    dir: str = "???"  # RUN or RUN/checkpoints: metrics and recipe go to RUN, iterations to RUN/checkpoints
    interval: int = 100  # steps
    keep: int = 2  # newest complete iterations kept; 0 keeps all
    keep_every: int = 0  # steps; iterations that are multiples of it are kept beside the newest; 0: none
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
    longlora: LongLora = field(default_factory=LongLora)
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
    """Read a recipe and apply `key=value` overrides.  Raises InputError; rules.check does the rest.

    Defaults that depend on the model (context.original, the interpolation factor, steps from tokens) are
    filled in, so that what is returned is the recipe as resolved.
    """
    import yaml
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
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    _resolve(recipe, where)
    return recipe


def recipe_of(tree: dict) -> Recipe:
    """A recipe from the tree of a RUN/recipe.yaml, or what there is of it: nothing is filled in.  Raises InputError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    model, checkpoint = {"hf": "", **(tree.get("model") or {})}, {"dir": "", **(tree.get("checkpoint") or {})}
    if "async" in checkpoint:
        checkpoint["asynchronous"] = checkpoint.pop("async")
    tree = {**tree, "model": model, "checkpoint": checkpoint}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.create(tree)))
    except OmegaConfBaseException as error:
        raise InputError(_explain("recipe.yaml", error)) from None


_BUDGET = {"steps", "tokens"}  # of train


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
    if OmegaConf.is_dict(config.get("checkpoint")) and "async" in config.checkpoint:
        config.checkpoint.asynchronous = config.checkpoint.pop("async")
    parent = config.pop("inherit", None)
    if parent is None:
        return config
    if not isinstance(parent, str):
        raise InputError(f"{path}: inherit={parent} should be the name of one recipe")
    inherited = _read_yaml(path.parent / parent, seen | {path.resolve()})
    ours, theirs = config.get("train"), inherited.get("train")
    if OmegaConf.is_dict(ours) and OmegaConf.is_dict(theirs) and _BUDGET & set(ours):
        for key in _BUDGET & set(theirs):  # the budget is said anew here, in whichever of the two units
            theirs.pop(key)
    return OmegaConf.merge(inherited, config)


def _explain(where: str, error: Exception) -> str:
    """One line for OmegaConf's error: the key in full, and what would be right."""
    key = str(getattr(error, "full_key", None) or "").replace("asynchronous", "async")
    message = str(error).splitlines()[0].strip().replace("asynchronous", "async")
    if type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
        section, _, name = key.rpartition(".")
        siblings = _field_names(section)
        return f"{where}: unknown key {key or name}; {section or 'a recipe'} takes {', '.join(siblings)}"
    if type(error).__name__ == "MissingMandatoryValue" or "Incompatible value 'None'" in message:
        return f"{where}: {key or 'a key'} is missing"
    value_for_section = re.fullmatch(r"Merge error: .* is not a subclass of (\w+)\. value: (.*)", message)
    if value_for_section:
        kind, value = value_for_section.groups()
        return f"{where}: {kind.lower()}={value} should be a section with keys of its own"
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
    one_of(where, "context.method", context.method, METHODS)
    one_of(where, "context.rope.type", context.rope.type, ROPE_TYPES)
    for key, value in _numbers(recipe.as_dict()):
        if not math.isfinite(value):
            raise InputError(f"{where}: {key}={value} should be a finite number")
        if key in _POSITIVE and value <= 0:
            raise InputError(f"{where}: {key}={value} should be positive")
        if key in _NOT_NEGATIVE and value < 0:
            raise InputError(f"{where}: {key}={value} should be at least 0")
    if not 0 <= train.seed < 2**32:
        raise InputError(f"{where}: train.seed={train.seed} should lie between 0 and {2**32 - 1}")
    if context.rope.type == "keep":
        _keep_rope(context, where)
    if context.original is None and Path(recipe.model.hf).is_dir():
        context.original = read_shape(recipe.model.hf).window
    if context.rope.factor is None and context.original is not None:
        context.rope.factor = context.target / context.original
    if recipe.data.packing == "documents" and recipe.data.align is None:
        # Ranks of context parallelism take two chunks of every sample.
        recipe.data.align = 2 * recipe.parallel.context if recipe.parallel.context > 1 else 1
    if recipe.data.kind == "chat" and recipe.data.long is None:
        recipe.data.long = "drop"
    from_tokens = math.ceil(train.tokens / recipe.tokens_per_step) if train.tokens is not None else None
    if train.steps is None and from_tokens is None:
        raise InputError(f"{where}: train.steps is missing; give it, or train.tokens")
    if None not in (train.steps, from_tokens) and train.steps != from_tokens:
        raise InputError(
            f"{where}: train.steps={train.steps} contradicts train.tokens={train.tokens} ({from_tokens} steps); "
            "give one"
        )
    train.steps = train.steps or from_tokens


def _keep_rope(context: Context, where: str) -> None:
    """The model's window is the target already, and its frequencies stay: whatever scales them again is refused."""
    if context.rope.factor not in (None, 1.0):
        raise InputError(
            f"{where}: context.rope.factor={context.rope.factor} with context.rope.type=keep: the checkpoint's own "
            "scaling stays as it is; leave the factor out"
        )
    if context.original not in (None, context.target):
        raise InputError(
            f"{where}: context.original={context.original} with context.rope.type=keep: nothing is extended, and the "
            f"model's window is context.target={context.target}; leave it out"
        )
    context.original = context.target


_POSITIVE = {
    *("context.original", "context.target", "context.physical", "context.chunks", "context.rope.factor"),
    *("context.anchors", "context.curriculum_samples"),
    *("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.context"),
    *("train.global_batch_size", "train.micro_batch_size", "train.steps", "train.tokens", "train.log_interval"),
    *("train.valid_samples", "train.max_nonfinite_steps", "optim.lr", "optim.eps", "checkpoint.interval"),
    *("parallel.recompute_layers", "train.watchdog_floor_s", "data.align", "longlora.groups", "longlora.alpha"),
}
_NOT_NEGATIVE = {
    *("train.valid_interval", "optim.min_lr", "optim.weight_decay", "optim.grad_clip", "checkpoint.keep"),
    *("train.gc_interval", "train.straggler_interval", "train.watchdog_factor", "checkpoint.keep_every"),
    *("precision.bf16_edge_layers", "data.min_document_tokens", "longlora.rank"),
    *("context.recall.tokens", "context.recall.key"),
}


def _numbers(tree: dict, prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a recipe with its dotted key, those in lists apart."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + str(name), value


def one_of(where: str, key: str, value: Any, legal: tuple) -> None:
    """Raise InputError unless `value` of `key` is one of the legal ones."""
    if value not in legal:
        raise InputError(f"{where}: {key}={value} should be one of {', '.join(map(str, legal))}")


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported (it is not imported here)."""
    return importlib.util.find_spec("transformer_engine") is not None
