"""The report's sections on the training: losses, what was read of each source, and what it cost."""

from typing import TYPE_CHECKING

from endprompt_megatron.common.html_page import (
    WIDE,
    Block,
    Cell,
    Figure,
    Group,
    Heading,
    Paragraph,
    Row,
    Section,
    Table,
    missing,
    note,
)
from endprompt_megatron.common.plotting import page_palette
from endprompt_megatron.report.run_files import Run, Runs
from endprompt_megatron.report.sections import cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_s", "Speed", "tokens a second"),
    ("memory_gib", "Memory", "GiB, peak of the first process"),
)
BY_HEART = "The prompts are a few fixed texts: their loss soon falls by memory alone."


def training(runs: Runs) -> Section:
    """Losses, context and prompt apart; of one run also learning rate, gradient norm, speed and memory."""
    logged = [run for run in runs.all if run.steps]
    if not logged:
        return Section("training", "Training", [missing("There is no `metrics.jsonl` with logged steps.")])
    drawn = _of_one(logged[0]) if len(logged) == 1 else _of_several(runs)
    notes = [_notes(run, len(logged) > 1) for run in logged]
    return Section("training", "Training", [*notes, *drawn, *_virtual(runs), *data_seen(runs)])


def _notes(run: Run, named: bool) -> Paragraph:
    held = [line for line in run.validations if isinstance(line.get("valid_loss"), (int, float))]
    notes = ["No validation was run."]
    if held:
        notes = [f"Validation loss at step {held[-1]['step']:,}: {held[-1]['valid_loss']:.4f}."]
    skipped = max((line.get("skipped_steps") or 0 for line in run.steps), default=0)
    if skipped:
        notes.append(f"{skipped} updates were skipped because a loss or gradient was not finite.")
    name = f"**{run.name}**: " if named else ""
    return Paragraph(f"{name}{' '.join(notes)}")


def _prompted(run: Run) -> bool:
    return any(isinstance(line.get("loss_prompt"), (int, float)) for line in run.steps)


def _of_one(run: Run) -> list[Block]:
    from endprompt_megatron.report.figures import losses, small

    large = Figure(
        lambda axes: losses(axes, run.steps, run.validations),
        "Loss over training",
        "Faint: each logged step. Strong: smoothed. " + (BY_HEART if _prompted(run) else ""),
        WIDE,
    )
    panels = [
        Figure(
            lambda axes, key=key, name=name, unit=unit: small(axes, run.steps, key, name, unit),
            name,
            size=(3.6, 2.3),
        )
        for key, name, unit in PANELS
        if any(isinstance(line.get(key), (int, float)) for line in run.steps)
    ]
    return [large, Group(panels, small=True)]


def keys_of(runs: Runs) -> dict[str, Run]:
    """The key of each run's colour, as models.py gives them."""
    keys = ["extended", *(f"run{number}" for number in range(2, len(runs.runs) + 1))]
    found = dict(zip(keys, runs.runs, strict=True))
    return found | ({"control": runs.control} if runs.control else {})


def _of_several(runs: Runs) -> list[Block]:
    from endprompt_megatron.report.figures import over_steps, series

    keyed = keys_of(runs)
    palette = page_palette({key: run.name for key, run in keyed.items()})
    drawn = []
    for name, unit, key in (
        ("Context loss", "nats a token", "loss_context"),
        ("Prompt loss", "nats a token", "loss_prompt"),
        ("Context loss, held out", "nats a token", "valid_loss_context"),
        ("Gradient norm", "before clipping", "grad_norm"),
    ):
        held_out = key.startswith("valid")
        found = {label: series(run.validations if held_out else run.steps, key) for label, run in keyed.items()}
        lines = {label: line for label, line in found.items() if line[0]}
        if not lines:
            continue

        def draw(
            axes: "Axes", lines: dict = lines, name: str = name, unit: str = unit, held_out: bool = held_out
        ) -> None:
            over_steps(axes, lines, name, unit, palette, 0.0 if held_out else 0.85)

        drawn.append(Figure(draw, name))
    words = ["Faint: each logged step. Strong: smoothed."]
    if any(_prompted(run) for run in runs.all):
        words.append(BY_HEART)
    return [Group(drawn), *note(words)]


def _virtual(runs: Runs) -> list[Block]:
    """The validation's probe of virtual distances; nothing where no run has it."""
    from endprompt_megatron.report.figures import virtual_over_training

    probed = [run for run in runs.all if any(line.get("virtual") for line in run.validations)]
    drawn = []
    for run in probed:
        name = f", {run.name}" if len(runs.all) > 1 else ""
        drawn.append(
            Figure(
                lambda axes, run=run: virtual_over_training(axes, run.validations),
                f"Virtual distance over training{name}",
                f"Each validation{name}: faint at the start, strong at the end.",
            )
        )
    if len(probed) > 1:
        drawn += _furthest_over_steps(runs)
    if not drawn:
        return []
    words = "A passage within a short input whose last tokens carry far position ids is to be repeated word for word."
    return [Heading("Virtual distance over training"), *note([words]), Group(drawn)]


def _furthest_over_steps(runs: Runs) -> list[Figure]:
    """The runs' losses over the steps at the furthest virtual distance that all of them probe; [] without any."""
    from endprompt_megatron.report.figures import over_steps

    keyed = {key: run for key, run in keys_of(runs).items() if any(line.get("virtual") for line in run.validations)}
    probed = {key: [line for line in run.validations if line.get("virtual")] for key, run in keyed.items()}
    common = set.intersection(*(set(line["virtual"]) for lines in probed.values() for line in lines))
    if not common:
        return []
    furthest = max(common, key=int)
    lines = {}
    for key, of_run in probed.items():
        found = [(line["step"], line["virtual"][furthest]["loss"]) for line in of_run]
        found = [(step, loss) for step, loss in found if loss is not None]
        lines[key] = ([step for step, _ in found], [loss for _, loss in found])
    palette = page_palette({key: run.name for key, run in keyed.items()})
    title = f"Recalling at {int(furthest):,}, while training"
    return [Figure(lambda axes: over_steps(axes, lines, title, "loss, nats a token", palette, 0.0), title)]


def data_seen(runs: Runs) -> list[Block]:
    """What training read of each source; nothing where no run wrote it down."""
    columns = (
        ("samples", "samples", "{:,}"),
        ("share", "share", "{:.1%}"),
        ("context_tokens", "context tokens", "{:,}"),
        ("prompt_tokens", "prompt tokens", "{:,}"),
        ("epochs", "epochs", "{:.2f}"),
    )
    rows = []
    for run in runs.all:
        for source in run.seen:
            name = Cell(str(source["prefix"]), small=run.name if len(runs.all) > 1 else "")
            rows.append(Row(name, [form.format(source[key]) for key, _, form in columns]))
    if not rows:
        return []
    return [Heading("Data seen"), Table([name for _, name, _ in columns], rows, "Up to the newest checkpoint.")]


def costs(runs: Runs) -> Section | None:
    """What each run took, and what the planner says of its recipe; None without a logged step."""
    logged = [run for run in runs.all if run.steps]
    if not logged:
        return None
    spent = [cost.spent(run) for run in logged]
    plans = [cost.planned(run, each) for run, each in zip(logged, spent, strict=True)]
    rows = [*cost.spent_rows(spent), *cost.plan_rows(plans)]
    shown = [row for row in rows if any(cell != cost.NONE for cell in row.cells)]
    table = Table([run.name for run in logged], shown)
    return Section("cost", "Cost", [table, *note(cost.notes(spent, plans))])
