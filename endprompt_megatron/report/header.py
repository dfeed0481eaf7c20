"""The top of the page: of one run its recipe in words and a few numbers, of several what tells them apart."""

from endprompt_megatron.common.html_page import Block, Cell, Details, Paragraph, Row, Table, missing
from endprompt_megatron.report.run_files import Run, Runs

_ALWAYS = ("context.method", "context.original", "context.target", "context.physical", "context.rope.type")
_ELSEWHERE = ("checkpoint.dir", "log.", "data.cache")  # where things are kept tells no runs apart
_MAX_OPEN = 16  # rows of the recipes' table; more are folded


def header(runs: Runs) -> dict:
    """The page's heading, the line above it, its introduction and its facts, as `Page` takes them."""
    if not runs.several:
        run = runs.runs[0]
        return {
            "kind": "Long-context extension, one run",
            "heading": run.name,
            "introduction": [_lead(run)],
            "facts": _facts(run),
        }
    models = {str(run.value("model.hf")) for run in runs.all if run.recipe}
    lead = [Paragraph(f"All of {models.pop()}.", "lead")] if len(models) == 1 else []
    return {
        "kind": f"Long-context extension, {len(runs.runs)} runs side by side",
        "heading": " · ".join(run.name for run in runs.runs),
        "introduction": [*lead, _recipes(runs)],
    }


def _lead(run: Run) -> Paragraph:
    """The recipe in words."""
    get = run.value
    method, target, physical = (get(f"context.{key}") for key in ("method", "target", "physical"))
    if not isinstance(target, int) or not isinstance(physical, int):
        if run.trained:
            return missing("The run has no readable `recipe.yaml`.")
        return missing("An evaluation alone: no recipe and no training are in this directory.")
    original = get("context.original")
    reach = f"from {original:,} to {target:,} tokens" if isinstance(original, int) else f"to {target:,} tokens"
    how, kind = f"with `{method}` on sequences of {physical:,} tokens", get("context.rope.type")
    what = f"extended {reach} {how}, {kind or 'linear'} RoPE scaling."
    if kind == "keep":
        chat = " on conversations," if get("data.kind") == "chat" else ""
        what = f"trained{chat} {how}; its window of {target:,} tokens and its RoPE are kept."
    words = f"{get('model.hf', 'The model')}, {what}"
    optim = [f"Peak learning rate {get('optim.lr'):g}"] if isinstance(get("optim.lr"), float) else []
    optim += [f"{get('train.global_batch_size')} sequences a step"] if get("train.global_batch_size") else []
    optim += [str(get("precision.dtype"))] if get("precision.dtype") else []
    words += f" {', '.join(optim)}." if optim else ""
    return Paragraph(words, "lead")


def _facts(run: Run) -> list[tuple[str, str]]:
    """The few numbers one asks for first."""
    if not run.steps:
        return []
    last = run.steps[-1]
    facts = [("steps", f"{last['step']:,}")]
    if last.get("consumed_tokens"):
        facts.append(("tokens", f"{last['consumed_tokens']:,}"))
    for name, key, form in (
        ("last context loss", "loss_context", "{:.3f}"),
        ("tokens a second", "tokens_per_s", "{:,.0f}"),
        ("memory a process", "memory_gib", "{:.1f} GiB"),
    ):
        value = run.final(key)
        if value is not None:
            facts.append((name, form.format(value)))
    return facts


def _recipes(runs: Runs) -> Block:
    """What the recipes are, as far as one asks for it first, and where they differ."""
    flat = [_flat(run.recipe) for run in runs.all]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    differing = [
        key
        for key in keys
        if not key.startswith(_ELSEWHERE) and len({str(recipe.get(key, "–")) for recipe in flat if recipe}) > 1
    ]
    shown = [*(key for key in _ALWAYS if key in keys), *(key for key in differing if key not in _ALWAYS)]
    rows = [Row(Cell(key, code=True), [str(recipe.get(key, "–")) for recipe in flat]) for key in shown]
    facts = [dict(_facts(run)) for run in runs.all]
    for name in dict.fromkeys(name for of_run in facts for name in of_run):
        rows.append(Row(name, [of_run.get(name, "–") for of_run in facts]))
    if not rows:
        return missing("Evaluations alone: no recipe and no training are in these directories.")
    head = [run.name + (" (control)" if run is runs.control else "") for run in runs.all]
    table = Table(head, rows, "The recipes where they differ, and the training in short.", kind="recipes")
    return table if len(rows) <= _MAX_OPEN else Details("The recipes where they differ", [table])


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Dotted keys; lists and mappings with other keys than a recipe's stay values."""
    found: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in ("data.train", "data.valid"):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
