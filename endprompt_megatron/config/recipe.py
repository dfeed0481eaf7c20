"""The recipe: what a run is, as typed dataclasses.  One line a key: default, meaning, limits (keys.py).

load.py reads it from YAML, resolve.py fills in what follows from the model, constraints/ refuses what does not go
together.  docs/recipes.md has the same table, made by key_table.py.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from endprompt_megatron.config.keys import REQUIRED, entry, in_yaml_names, section
from endprompt_megatron.method.positions import MAPS
from endprompt_megatron.method.rope_parameters import Scaling

ROPE_TYPES = {
    "linear": "position interpolation",
    "ntk": "a larger base",
    "dynamic": "a base that follows the input's length",
    "yarn": "",
    "llama3": "",
    "longrope": "a divisor for each pair of dimensions, `long_factor`, in inputs beyond the original window",
    "none": "the model's own RoPE in a longer window",
    "keep": "its own RoPE and window, for a model that was extended already, whose window is `context.target`",
}
CUE = "Recall the passage of the text above that begins with these words:"
DATA_KINDS = {"text": "", "chat": "conversations, with a loss on the answers alone, see [sft.md](sft.md)"}
LONG = {"drop": "they are left out", "cut": "their beginning is kept"}
PACKINGS = {
    "stream": "context segments cut from the concatenated corpus",
    "documents": "each document is a sample, packed into rows, see [samples.md](samples.md#packing-documents)",
}
DOCUMENT_ENDS = {"cross": "across the ends of documents", "within": "each within one document"}
CONTEXT_COMM = {"p2p": "a ring", "all_gather": "", "a2a": "heads for sequence"}
RECOMPUTE = {
    "none": "",
    "selective": "core attention",
    "block": "some layers of each stage",
    "full": "all layers, in units",
}
FP8 = {"hybrid": "E4M3, gradients in E5M2", "e4m3": ""}
FP8_RECIPES = {"delayed": "", "tensorwise": "current scaling", "blockwise": "", "mxfp8": "Blackwell"}
# Which keys of context.rope a type takes beside factor and theta.
ROPE_KNOBS = {
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("long_factor", "short_factor", "attention_factor"),
}
# What keys without a value stand for.
ALIGN = "2 x `parallel.context`, 1 without it"
OVERLAP = "on GPUs with several replicas"


@dataclass
class Model:
    hf: str = entry(REQUIRED, "Hugging Face directory: shape, tokenizer, the config to export")
    init_from: str | None = entry(None, "what training starts from: a Megatron checkpoint, or a Hugging Face directory")


@dataclass
class Rope:
    type: str = entry("linear", "how RoPE is scaled", choices=ROPE_TYPES, fixed=True)
    factor: float | None = entry(None, "interpolation factor s", unset="target / original", positive=True, fixed=True)
    theta: float | None = entry(
        None, "another base, before it is scaled", unset="the model's", positive=True, fixed=True
    )
    beta_fast: float | None = entry(None, "YaRN's", unset="32", positive=True, fixed=True)
    beta_slow: float | None = entry(None, "YaRN's", unset="1", positive=True, fixed=True)
    truncate: bool | None = entry(None, "YaRN rounds the borders of its ramp", unset="true", fixed=True)
    attention_factor: float | None = entry(
        None, "YaRN's and LongRoPE's, of cosines and sines", unset="that of the paper", positive=True, fixed=True
    )
    long_factor: list[float] | None = entry(None, "LongRoPE's divisors, half of head_dim", unset="refused", fixed=True)
    short_factor: list[float] | None = entry(
        None, "the same for inputs within the original window", unset="ones", fixed=True
    )

    @property
    def knobs(self) -> dict[str, Any]:
        """What is set beside type, factor and base, under transformers' names, which are these."""
        names = [field.name for field in fields(self) if field.name not in ("type", "factor", "theta")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class Recall:
    """The terminal prompt asks for a span of its own context: method/recall.py."""

    tokens: int = entry(0, "tokens of the context that the terminal prompt asks for; 0: none", minimum=0, fixed=True)
    cue: str = entry(CUE, "the text before the span", fixed=True)
    key: int = entry(8, "first tokens of the span: they say what to recall and have weight 0", minimum=0, fixed=True)
    share: float = entry(1.0, "part of the samples with a recall prompt; the others have `context.prompts`", fixed=True)


@dataclass
class Retain:
    """What the base could do inside its window is kept by its own distributions: training/retention.py."""

    weight: float = entry(0.0, "of the divergence from the base on untouched samples; 0: none", minimum=0, fixed=True)
    every: int = entry(1, "steps from one that has such samples to the next", positive=True, fixed=True)


@dataclass
class Context:
    method: str = entry("end_prompt", "the position map ([methods.md](methods.md))", choices=MAPS, fixed=True)
    original: int | None = entry(None, "L0, the model's own window", unset="the model's window", positive=True)
    target: int = entry(65536, "L, the new window", positive=True, fixed=True)
    physical: int = entry(8192, "tokens of a sequence, context segment and terminal prompt", positive=True, fixed=True)
    prompts: list[str] = entry(
        ["EP_1"], "drawn per sample: `EP_1`, `EP_2` (`<|eot_id|>` or EOS), `EP_3`, or `text:...`", fixed=True
    )
    prompt_loss_weight: float = entry(1.0, "weight of prompt tokens in the loss; context tokens have 1", fixed=True)
    chunks: int = entry(2, "chunks, for maps that split a segment", positive=True, fixed=True)
    anchors: int = entry(4, "copies of the prompt in a sequence, for maps that repeat it", positive=True, fixed=True)
    anchor_tokens: int = entry(
        20, "last tokens of a sample that move, for the map that moves them", positive=True, fixed=True
    )
    sigma: int = entry(3, "spread of CREAM's middle, in halves of a sample's length", positive=True, fixed=True)
    curriculum_samples: int | None = entry(
        None,
        "samples until a prompt that moves is at the end of the window; needed by maps that move it",
        positive=True,
        fixed=True,
    )
    recall: Recall = section(Recall)
    retain: Retain = section(Retain)
    content_skip: bool = entry(False, "PoSE takes its chunks from different places of a document", fixed=True)
    rope: Rope = section(Rope)

    @property
    def knobs(self) -> dict[str, int]:
        """What the method's position map takes beside lengths, index and seed; what is not set keeps its default."""
        values = {name: getattr(self, name, None) for name in MAPS[self.method].knobs}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def scaling(self) -> Scaling:
        """The RoPE scaling of the extension, once `original` and `rope.factor` are resolved."""
        return Scaling(self.rope.type, self.rope.factor, self.original, self.target, self.rope.theta, self.rope.knobs)


@dataclass
class Data:
    train: Any = entry(
        None,
        "PREFIX of tools/prepare_data.py, a list of them, `{PREFIX: weight}` or "
        "`{PREFIX: {weight: 0.3, prompts: [EP_2]}}`",
        fixed="its content",
    )
    valid: Any = entry(None, "held-out data in the same form; or `99,1`: the last hundredth of `data.train`")
    kind: str = entry("text", "what the samples are made of", choices=DATA_KINDS, fixed=True)
    long: str | None = entry(None, "conversations beyond `context.physical`", unset="drop", choices=LONG, fixed=True)
    packing: str = entry("stream", "how documents become samples", choices=PACKINGS, fixed=True)
    document_ends: str = entry("cross", "where context segments lie", choices=DOCUMENT_ENDS, fixed=True)
    min_document_tokens: int = entry(0, "shorter documents are left out", minimum=0, fixed=True)
    align: int | None = entry(None, "packed samples are padded to multiples", unset=ALIGN, positive=True, fixed=True)
    cache: str | None = entry(None, "where large sample indices are kept; all ranks must see it", unset="RUN/index")


@dataclass
class Parallel:
    tensor: int = entry(1, "ranks that each layer is split over", positive=True)
    pipeline: int = entry(1, "stages that the layers are spread over; other ranks are data parallel", positive=True)
    virtual_pipeline: int | None = entry(None, "virtual stages of each stage", positive=True)
    count_embedding: bool = entry(False, "the pipeline's split counts the embedding as a layer")
    count_loss: bool = entry(False, "the pipeline's split counts the loss as a layer")
    context: int = entry(1, "ranks that each sequence is split over", positive=True)
    context_comm: str = entry("p2p", "how keys and values travel between them", choices=CONTEXT_COMM)
    sequence: bool = entry(False, "sequence parallelism, with `tensor` above 1")
    recompute: str = entry("none", "activations that the backward pass computes again", choices=RECOMPUTE)
    recompute_layers: int | None = entry(
        None,
        "with `block`, layers of each (virtual) stage that are recomputed; with `full`, layers of a unit",
        positive=True,
    )
    overlap_grad_reduce: bool | None = entry(None, "hide gradient reduction behind the backward pass", unset=OVERLAP)
    overlap_param_gather: bool | None = entry(None, "hide parameter gathering behind the forward pass", unset=OVERLAP)
    overlap_tensor: bool = entry(False, "hide tensor-parallel traffic behind the GEMMs (needs Transformer Engine)")


@dataclass
class Train:
    global_batch_size: int = entry(64, "sequences a step", positive=True, fixed=True)
    micro_batch_size: int = entry(1, "sequences a forward pass", positive=True)
    steps: int | None = entry(None, "the budget in steps", unset="from `train.tokens`", positive=True)
    tokens: int | None = entry(None, "the budget in physical tokens, instead of steps", positive=True)
    seed: int = entry(42, "of data order, prompts and positions", minimum=0, maximum=2**32 - 1, fixed=True)
    deterministic: bool = entry(False, "the same bits from every run on GPUs too; slower ([running.md](running.md))")
    log_interval: int = entry(1, "steps between lines of metrics.jsonl", positive=True)
    valid_interval: int = entry(0, "steps between validations; 0: only at the end, with `data.valid`", minimum=0)
    valid_samples: int = entry(64, "samples of a validation", positive=True)
    virtual_distances: list[int] = entry([], "virtual lengths of the probe that runs with validation")
    max_nonfinite_steps: int = entry(5, "steps in a row without a finite loss, then the run stops", positive=True)
    gc_interval: int = entry(100, "steps between garbage collections, on all ranks at once; 0: Python's own", minimum=0)
    straggler_interval: int = entry(100, "steps between reports of the slowest rank; 0: none", minimum=0)
    watchdog_factor: float = entry(
        10.0,
        "a step that takes so many medians ends the run, with every rank's stack in RUN/stacks; 0: none",
        minimum=0,
    )
    watchdog_floor_s: float = entry(
        60.0,
        "seconds that a step may always take; saves, validations and the first steps 30 times as many",
        positive=True,
    )


@dataclass
class Optim:
    lr: float = entry(2.0e-5, "peak learning rate", positive=True)
    min_lr: float = entry(0.0, "final learning rate", minimum=0)
    warmup_steps: int = entry(20, "steps of linear warm-up")
    schedule: str = entry("constant", "after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = entry(0.0, "AdamW's; norms are not decayed", minimum=0)
    betas: list[float] = entry([0.9, 0.95], "AdamW's")
    eps: float = entry(1.0e-8, "AdamW's", positive=True)
    grad_clip: float = entry(1.0, "largest norm of the gradients; 0: they are not clipped", minimum=0)
    moments_dtype: str = entry("float32", "of AdamW's moments", choices=("float32", "bfloat16", "fp8"))


@dataclass
class Precision:
    dtype: str = entry("bfloat16", "master weights stay float32", choices=("bfloat16", "float32"), fixed=True)
    fp8: str | None = entry(None, "matrix products in FP8, on Hopper and later", choices=FP8)
    fp8_recipe: str = entry("delayed", "how FP8 is scaled", choices=FP8_RECIPES)
    fp8_attention: bool = entry(False, "attention in FP8 too: `delayed` or `tensorwise`; on Hopper head_dim 128")
    bf16_edge_layers: int = entry(0, "first and last layers that stay in BF16 (not with `delayed`)", minimum=0)
    grad_reduce: str = entry("float32", "gradients are summed and sent in it", choices=("float32", "bfloat16"))


@dataclass
class LongLora:
    shifted: bool = entry(False, "shifted sparse attention in training ([longlora.md](longlora.md))", fixed=True)
    groups: int = entry(4, "groups of a sequence in which shifted attention is causal", positive=True, fixed=True)
    rank: int = entry(0, "rank of LoRA on q, k, v and o; 0: every parameter is trained", minimum=0, fixed=True)
    mlp: bool = entry(False, "LoRA on gate, up and down as well", fixed=True)
    init_from: str | None = entry(None, "an adapter in PEFT's format to start from", unset="a new one")
    alpha: float = entry(16.0, "LoRA adds alpha / rank times its product", positive=True, fixed=True)
    train_embeddings: bool = entry(True, "train the embeddings beside LoRA", fixed=True)
    train_norms: bool = entry(True, "train the norms beside LoRA; all else is frozen", fixed=True)
    save_frozen: bool = entry(True, "false: checkpoints without the frozen weights, which model.init_from has to keep")


@dataclass
class Checkpoint:
    dir: str = entry(REQUIRED, "RUN, or RUN/checkpoints: metrics and recipe go to RUN, iterations to RUN/checkpoints")
    interval: int = entry(100, "steps between checkpoints", positive=True)
    keep: int = entry(2, "newest complete iterations kept; 0 keeps all", minimum=0)
    keep_every: int = entry(0, "iterations that are multiples of so many steps are kept for good; 0: none", minimum=0)
    export_every: int = entry(
        0, "Hugging Face weights of iterations that are multiples of so many steps, in RUN/exports; 0: none", minimum=0
    )
    # `async` is a reserved word in Python.
    asynchronous: bool = entry(False, "write checkpoints while training goes on", name="async")


@dataclass
class Log:
    tensorboard: bool = entry(True, "write metrics for TensorBoard to RUN/tensorboard")
    wandb: str | None = entry(None, "W&B project name")


@dataclass
class Recipe:
    model: Model = section(Model)
    context: Context = section(Context)
    data: Data = section(Data)
    parallel: Parallel = section(Parallel)
    train: Train = section(Train)
    optim: Optim = section(Optim)
    precision: Precision = section(Precision)
    longlora: LongLora = section(LongLora)
    checkpoint: Checkpoint = section(Checkpoint)
    log: Log = section(Log)

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
        return in_yaml_names(self)

    def as_yaml(self) -> str:
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.as_dict()))
