"""What a page does not show, as far as that follows from what was run, and how what it shows was made."""

from collections.abc import Iterator

from endprompt_megatron import __version__
from endprompt_megatron.common.html_page import Bullets, Code, Details, Section
from endprompt_megatron.evaluate.registry import SUITES, Suite
from endprompt_megatron.method.positions import MAPS, PositionMap
from endprompt_megatron.report.models import Measured, Model
from endprompt_megatron.report.run_files import Run, Runs


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
    points, target = [], run.value("context.target")
    there = [suite for suite in SUITES.values() if suite.name in model.measured]
    target = target if isinstance(target, int) else model.about.get("window")
    longest = max((length for suite in there for length in _real_lengths(suite, model)), default=0)
    if longest and isinstance(target, int) and longest < target:
        points.append(f"Real inputs between {longest:,} and {target:,} tokens.")
    for suite in there:
        limits = suite.limits(model.measured[suite.name], model.settings(suite))
        title = suite.variant(model.measured[suite.name]) or suite.title
        points += [f"{title}: {limit}." for limit in limits]
    if not any(other.key.startswith("baseline") and other.run is run for other in measured.models) and not any(
        other.key == "baseline" for other in measured.models
    ):
        points.append("What the model did before: no baseline was measured.")
    not_run = [suite.unknown_without for suite in SUITES.values() if suite not in there and suite.unknown_without]
    if not_run:
        points.append(f"Not run: {'; '.join(not_run)}.")
    for what, reason in ((run.evaluation or {}).get("left_out") or {}).items():
        points.append(f"Asked for and left out: {what} ({reason}).")
    return points


def _real_lengths(suite: Suite, model: Model) -> list[int]:
    """Lengths of the suite's real inputs in tokens, where its settings say them."""
    named = suite.real_lengths(model.settings(suite))
    return [length for lengths in named.values() for length in lengths]


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
        points.append("How another seed of the training would come out: the intervals are over the requests alone.")
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
