"""The report's sections on the training: losses, what was read of each source, and what it cost."""

from html import escape
from typing import TYPE_CHECKING

from endprompt_megatron.report.html import WIDE, Figures, group, missing, note, section, table
from endprompt_megatron.report.load import Run, Runs
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


def training(runs: Runs, figures: Figures) -> str:
    """Losses, context and prompt apart; of one run also learning rate, gradient norm, speed and memory."""
    title = "Training"
    logged = [run for run in runs.all if run.steps]
    if not logged:
        return section("training", title, missing("There is no <code>metrics.jsonl</code> with logged steps."))
    drawn = _of_one(logged[0], figures) if len(logged) == 1 else _of_several(runs, figures)
    notes = "".join(_notes(run, len(logged) > 1) for run in logged)
    return section("training", title, notes, drawn, data_seen(runs))


def _notes(run: Run, named: bool) -> str:
    held = [line for line in run.validations if isinstance(line.get("valid_loss"), (int, float))]
    notes = ["No validation was run."]
    if held:
        notes = [f"Validation loss at step {held[-1]['step']:,}: {held[-1]['valid_loss']:.4f}."]
    skipped = max((line.get("skipped_steps") or 0 for line in run.steps), default=0)
    if skipped:
        notes.append(f"{skipped} updates were skipped because a loss or gradient was not finite.")
    name = f"<strong>{escape(run.name)}</strong>: " if named else ""
    return f"<p>{name}{' '.join(notes)}</p>"


def _prompted(run: Run) -> bool:
    return any(isinstance(line.get("loss_prompt"), (int, float)) for line in run.steps)


def _of_one(run: Run, figures: Figures) -> str:
    from endprompt_megatron.report.figures import PAGE, losses, small

    large = figures.figure(
        lambda axes: losses(axes, run.steps, run.validations, PAGE),
        "Loss over training",
        "Faint: each logged step. Strong: smoothed. " + (BY_HEART if _prompted(run) else ""),
        WIDE,
    )
    panels = [
        figures.figure(
            lambda axes, key=key, name=name, unit=unit: small(axes, run.steps, key, name, unit, PAGE),
            name,
            size=(3.6, 2.3),
        )
        for key, name, unit in PANELS
        if any(isinstance(line.get(key), (int, float)) for line in run.steps)
    ]
    return large + group(panels, small=True)


def keys_of(runs: Runs) -> dict[str, Run]:
    """The key of each run's colour, as models.py gives them."""
    keys = ["extended", *(f"run{number}" for number in range(2, len(runs.runs) + 1))]
    found = dict(zip(keys, runs.runs, strict=True))
    return found | ({"control": runs.control} if runs.control else {})


def _of_several(runs: Runs, figures: Figures) -> str:
    from endprompt_megatron.report.figures import over_steps, page_palette, series

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

        drawn.append(figures.figure(draw, name))
    words = ["Faint: each logged step. Strong: smoothed."]
    if any(_prompted(run) for run in runs.all):
        words.append(BY_HEART)
    return group(drawn) + note(words)


def data_seen(runs: Runs) -> str:
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
        name = f"<small>{escape(run.name)}</small>" if len(runs.all) > 1 else ""
        for source in run.seen:
            cells = [form.format(source[key]) for key, _, form in columns]
            rows.append((f"{escape(str(source['prefix']))}{name}", cells))
    if not rows:
        return ""
    return "<h3>Data seen</h3>" + table([name for _, name, _ in columns], rows, caption="Up to the newest checkpoint.")


def costs(runs: Runs) -> str:
    """What each run took, and what the planner says of its recipe."""
    logged = [run for run in runs.all if run.steps]
    if not logged:
        return ""
    spent = [cost.spent(run) for run in logged]
    plans = [cost.planned(run, each) for run, each in zip(logged, spent, strict=True)]
    rows = []
    for name, cells in cost.rows(spent):
        if any(cell != cost.NONE for cell in cells):
            rows.append((name, cells))
    for name, cells in cost.plan_rows(plans):
        if any(cell != cost.NONE for cell in cells):
            rows.append((f'<span class="paper">{name}</span>', cells))
    head = [escape(run.name) for run in logged]
    return section("cost", "Cost", table(head, rows), note(cost.notes(spent, plans)))
