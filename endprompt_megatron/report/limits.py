"""What a page does not show, as far as that follows from what was run, and how what it shows was made."""

from collections.abc import Iterator

from endprompt_megatron import __version__
from endprompt_megatron.common.html_page import Bullets, Code, Details, Section
from endprompt_megatron.method.positions import MAPS, PositionMap
from endprompt_megatron.report.load import Run, Runs
from endprompt_megatron.report.models import Measured, Model

_QUESTIONS = {
    "ruler": "retrieval among distractors, tracing and counting (RULER)",
    "longbench": "questions about and summaries of real documents (LongBench)",
    "short": "what the extension costs within short inputs (short text)",
}


def not_shown(runs: Runs, measured: Measured) -> Section:
    """The limits of what the page says."""
    points = [point for of_run in _by_run(runs, measured) for point in of_run]
    points += _of_all(runs, measured)
    return Section("limits", "What is not shown", [Bullets(list(dict.fromkeys(points)))])


def _by_run(runs: Runs, measured: Measured) -> Iterator[list[str]]:
    for run in runs.runs:
        name = f"**{run.name}**: " if runs.several else ""
        model = next((m for m in measured.models if m.run is run and m.key.startswith(("extended", "run"))), None)
        yield [name + point for point in (_of_model(run, model, measured) if model else _of_nothing())]


def _of_nothing() -> list[str]:
    return ["Whether the model reads long inputs: nothing was evaluated, and a training loss does not say it."]


def _of_model(run: Run, model: Model, measured: Measured) -> list[str]:
    points, target, there = [], run.value("context.target"), model.measured
    target = target if isinstance(target, int) else model.about.get("window")
    longest = max(_real_lengths(model), default=0)
    if longest and isinstance(target, int) and longest < target:
        points.append(
            f"Real inputs between {longest:,} and {target:,} tokens."
            + (
                " Virtual lengths reach further, but there only a short input's tokens compete for attention."
                if "virtual" in there
                else ""
            )
        )
    found = (there.get("needle") or {}).get("cells") or []
    most = max((cell["samples"] for cell in found), default=0)
    if found and most < 20:
        prompts = f"{most} prompts a cell say" if most > 1 else "one prompt a cell says"
        points.append(f"Passkey accuracy to the percent: {prompts} only roughly.")
    if "perplexity" in there and model.settings.get("windows", 2) < 5:
        points.append(
            "Other texts: perplexity comes from a few stretches of one held-out text, "
            "and differences of a few hundredths in the loss may be chance."
        )
    if not any(other.key.startswith("baseline") and other.run is run for other in measured.models) and not any(
        other.key == "baseline" for other in measured.models
    ):
        points.append("What the model did before: no baseline was measured.")
    missing = [words for suite, words in _QUESTIONS.items() if suite not in there]
    if missing:
        points.append(f"Not run: {'; '.join(missing)}.")
    for what, reason in ((run.evaluation or {}).get("left_out") or {}).items():
        points.append(f"Asked for and left out: {what} ({reason}).")
    if "ruler" in there and (there["ruler"].get("left_out") or there["ruler"].get("notes")):
        points.append("RULER's published benchmark: it was asked in part or from other sources, as its section says.")
    if "longbench" in there and not (there["longbench"].get("mean_21") or {}).get("complete", False):
        points.append("LongBench's published benchmark: tasks or questions are missing, as its section says.")
    return points


def _real_lengths(model: Model) -> list[int]:
    """Lengths of real inputs in tokens, of any suite that says them."""
    settings, there = model.settings, model.measured
    lengths = []
    if any(suite in there for suite in ("perplexity", "ruler", "needle", "recall")):
        lengths += settings.get("lengths") or []
    if "needle" in there:
        lengths += settings.get("needle_lengths") or []
    return lengths


def _of_all(runs: Runs, measured: Measured) -> list[str]:
    points = []
    prompted = [run for run in runs.runs if _map(run) is not None and _map(run).has_prompt]
    shorts = [run for run in runs.runs if _map(run) is not None and _map(run).plain]
    if runs.control is None and prompted and not shorts:
        plain = " or ".join(name for name, position_map in MAPS.items() if position_map.plain)
        points.append(
            "What the terminal prompt contributes: no control was given. The same training without it (method "
            f"`{plain}`) has to stand beside this run before anything is credited to the prompt."
        )
    if runs.control is not None:
        method = runs.control.value("context.method", "unknown")
        for run in runs.runs:
            other, mine = runs.control.final("loss_context"), run.final("loss_context")
            pair = f" Last context loss: control {other:.3f}, this run {mine:.3f}." if None not in (other, mine) else ""
            points.append(
                f"More than the tables' difference between {run.name} and its control, "
                f"{runs.control.name} (`{method}`).{pair}"
            )
    if any(model.measured for model in measured.models):
        points.append("How another seed of the training would come out: the intervals are of the questions asked.")
    return points


def _map(run: Run) -> PositionMap | None:
    """The position map of a run's recipe; None where it says none that is known."""
    return MAPS.get(str(run.value("context.method")))


def provenance(runs: Runs) -> Section:
    """The recipes, and how the evaluations can be repeated."""
    import yaml

    blocks = []
    for run in runs.all:
        name = f"{run.name}: " if len(runs.all) > 1 else ""
        if run.recipe_text:
            recipe = Code(run.recipe_text.strip())
            blocks.append(Details(f"{name}recipe.yaml, as resolved", [recipe], printed=False))
        if run.evaluation is not None:
            kept = {
                key: run.evaluation.get(key) for key in ("created", "seconds", "settings", "text", "models", "versions")
            }
            text = Code(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip())
            blocks.append(Details(f"{name}evaluation: settings, models, versions", [text], printed=False))
    return Section("made", "How it was made", blocks)


def footer(runs: Runs) -> str:
    """The version, and where the runs are."""
    return f"endprompt_megatron {__version__}. {', '.join(str(run.directory) for run in runs.all)}"
