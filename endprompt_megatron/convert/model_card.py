"""The model card of an exported model: what the manifest and its recipe say, and nothing else."""

from pathlib import PurePath

from endprompt_megatron.config.keys import get
from endprompt_megatron.method.positions import MAPS
from endprompt_megatron.model.shape import ModelShape

_SFT = "supervised fine-tuning on conversations, with a loss on the answers alone"

_RETAINED = "context.retain.weight"  # shown where it is not 0

# Rows of the table: what it is called, and the recipe's key.
_ROWS = (
    ("Original window", "context.original"),
    ("Target window", "context.target"),
    ("RoPE scaling", "context.rope.type"),
    ("RoPE factor", "context.rope.factor"),
    ("Physical sequence length", "context.physical"),
    ("Terminal prompts", "context.prompts"),
    ("Weight of the prompt in the loss", "context.prompt_loss_weight"),
    ("Tokens recalled by the prompt", "context.recall.tokens"),
    ("Weight of the divergence from the base", _RETAINED),
    ("Tokens asked for", "train.tokens"),
    ("Steps asked for", "train.steps"),
    ("Sequences a step", "train.global_batch_size"),
    ("Seed", "train.seed"),
    ("Learning rate", "optim.lr"),
    ("Schedule", "optim.schedule"),
    ("Warm-up steps", "optim.warmup_steps"),
    ("Weight decay", "optim.weight_decay"),
    ("Precision", "precision.dtype"),
)
# The first transformers 4 that computes a type as transformers 5 does: tests/engines/test_older_transformers.py.
_TRANSFORMERS_4 = {"llama3": "4.43", "yarn": "4.51", "longrope": "4.51"}
_OF_EXTENSION = ("context.original", "context.rope.factor", "context.prompts", "context.prompt_loss_weight")


def base_name(manifest: dict) -> tuple[str, str]:
    """The base model of a checkpoint as its recipe names it, and for a reader.

    Where it lay on someone's disk is of no use to one; a relative name may be that of a hub.
    """
    base = str(get(manifest["recipe"], "model.hf") or manifest["source"])
    return base, PurePath(base).name if base.startswith(("/", ".", "~")) else base


def model_card(manifest: dict, shape: ModelShape, dtype: str) -> str:
    """README.md with front matter.  A checkpoint without a recipe was converted and not trained: the card says so."""
    recipe = manifest["recipe"]
    base, name = base_name(manifest)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    method = get(recipe, "context.method")
    if get(recipe, "data.kind") == "chat":
        method = "sft"
    kept = get(recipe, "context.rope.type") == "keep"
    if recipe:
        lines += ["tags:", "- long-context", f"- {str(method or 'endprompt').replace('_', '-')}"]
    target = get(recipe, "context.target")
    done = ", fine-tuned" if kept else f", extended to {target} tokens" if target else ""
    title = f"# {PurePath(base).name}{done}"
    lines += ["---", "", title, ""]
    if not recipe:
        lines += ["The weights of the source, converted to Megatron-Core and back; not trained further.", ""]
    table = [("Base model", name)]
    if method:
        table.append(("Method", _SFT if method == "sft" else _summary(method)))
    if get(recipe, "longlora.shifted"):
        groups = get(recipe, "longlora.groups")
        table.append(("Attention in training", f"shifted sparse attention, {groups} groups; plain attention since"))
    rank = get(recipe, "longlora.rank")
    if rank:
        beside = [name for name in ("embeddings", "norms") if get(recipe, f"longlora.train_{name}")]
        targets = "q, k, v, o, gate, up and down" if get(recipe, "longlora.mlp") else "q, k, v and o"
        lora = f"rank {rank}, alpha {get(recipe, 'longlora.alpha')} on {targets}, merged"
        table.append(("LoRA", lora + (f"; {' and '.join(beside)} trained beside it" if beside else "")))
    for label, key in _ROWS if recipe else ():
        value = get(recipe, key)
        if kept and key in _OF_EXTENSION:
            continue
        if value is not None and (value or key != _RETAINED):
            table.append((label, ", ".join(map(str, value)) if isinstance(value, list) else value))
    if recipe:
        table += [("Steps trained", manifest["step"]), ("Sequences trained on", manifest["consumed_samples"])]
    table += [("Parameters", f"{shape.parameters:,}"), ("Weights", dtype)]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {label} | {_escaped(value)} |" for label, value in table]
    if shape.rope.type == "linear":
        lines += [
            "",
            f"vLLM takes {shape.window} x {shape.rope.scaling['factor']:g} tokens for the window of a linear scaling: "
            f"give `--max-model-len {shape.window}`.",
            "",
            "Linear scaling costs retrieval that YaRN keeps, in endprompt_megatron's measurements (docs/rope.md); its "
            "recommended recipes (`recipes/*_recommended.yaml`) take YaRN.",
        ]
    elif needed := _TRANSFORMERS_4.get(shape.rope.type):
        lines += ["", f"Of transformers 4, {needed} and later compute this model's RoPE ({shape.rope.type})."]
    lines += ["", "Made with endprompt_megatron. The licence is that of the base model.", ""]
    return "\n".join(lines)


def _summary(method: str) -> str:
    """What the position map is; the name itself of one that is not known here."""
    return MAPS[method].summary if method in MAPS else method


def _escaped(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
