"""What a demo run shows, in two tables and in plain words, from numbers that this run measured alone."""

from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.demo.stages import LONGEST_READ, PASSAGE, ROOT, WINDOW, Knobs

NOTABLE = 0.05  # nats; on one passage a smaller difference means little


@dataclass(frozen=True)
class Column:
    """One model's measurements: loss by real input length, and facts recalled of those asked, by length."""

    title: str
    losses: dict[int, float]
    facts: dict[int, tuple[int, int]]

    def recalled(self, lengths: list[int]) -> str:
        """In inputs of these lengths together."""
        found, asked = (sum(self.facts[length][place] for length in lengths) for place in (0, 1))
        return f"{found} of {asked}"


def show(main_run: Knobs, control: Knobs) -> None:
    """Print the tables and what they mean, for whichever of the two runs has been evaluated."""
    print(text(main_run, control))


def text(main_run: Knobs, control: Knobs) -> str:
    """What `show` prints.  Raises InputError if neither run has been evaluated."""
    columns = collect(main_run, control)
    which = main_run if main_run.method in columns else control
    passage = f"Loss of the same {PASSAGE} tokens at the end of a real input (lower is better), by its length"
    lengths = sorted(columns["base"].losses)
    parts = [f"{passage}\n{_table(columns, {n: _losses(columns, n) for n in lengths})}"]
    rows = {n: [_fraction(column.facts.get(n)) for column in columns.values()] for n in sorted(columns["base"].facts)}
    parts.append(f"Facts recalled in real inputs of that length\n{_table(columns, rows)}")
    parts.append("What this run shows\n" + "\n".join(f"- {line}" for line in findings(columns, main_run, control)))
    parts.append("What it does not show\n" + "\n".join(f"- {line}" for line in limits(main_run)))
    reports = [run.run / "report.html" for run in (main_run, control) if (ROOT / run.run / "report.html").exists()]
    parts.append("\n".join(f"Report: {report}" for report in reports))
    parts.append(f"The extended model, for transformers and vLLM: {which.run / 'hf'}")
    return "\n\n" + "\n\n".join(parts)


def collect(main_run: Knobs, control: Knobs) -> dict[str, Column]:
    """The columns that exist, in order: base, untrained, end_prompt, short."""
    runs = [run for run in (main_run, control) if (ROOT / run.run / "evaluation" / "results.json").is_file()]
    if not runs:
        raise InputError(f"{main_run.run}: nothing has been evaluated yet; run make demo")
    evaluation = {run.method: _results(run.run / "evaluation") for run in runs}
    first = runs[0]
    columns = {"base": _column("base", evaluation[first.method], "baseline")}
    untrained = first.run / "untrained" / "evaluation"
    if (ROOT / untrained / "results.json").is_file():
        columns["untrained"] = _column("scaled, untrained", _results(untrained), "extended")
    titles = {main_run.method: "EndPrompt", control.method: "control (no prompt)"}
    for run in runs:
        columns[run.method] = _column(titles[run.method], evaluation[run.method], "extended")
    return columns


def _results(directory: Path) -> dict:
    return read_json(ROOT / directory / "results.json", "the results of tools/evaluate.py")


def _column(title: str, results: dict, label: str) -> Column:
    measured = results["measurements"][label]["recall"]
    losses = {each["length"]: each["loss"] for each in measured["passage"]}
    facts: dict[int, tuple[int, int]] = {}
    for cell in measured["cells"]:
        found, asked = facts.get(cell["length"], (0, 0))
        facts[cell["length"]] = (found + round(cell["recalled"] * cell["samples"]), asked + cell["samples"])
    return Column(title, losses, facts)


def _losses(columns: dict[str, Column], length: int) -> list[str]:
    values = [column.losses.get(length) for column in columns.values()]
    return ["-" if value is None else f"{value:.2f}" for value in values]


def _fraction(value: tuple[int, int] | None) -> str:
    return "-" if value is None else f"{value[0]} of {value[1]}"


def _table(columns: dict[str, Column], rows: dict[int, list[str]]) -> str:
    header = ["length", *(column.title for column in columns.values())]
    return text_table(header, [[f"{length:,}", *cells] for length, cells in rows.items()])


def findings(columns: dict[str, Column], main_run: Knobs, control: Knobs) -> list[str]:
    """Sentences that follow from the numbers, in either direction."""
    base = columns["base"].losses
    far = max(base)
    trained = columns.get(main_run.method) or columns[control.method]
    lines = []
    if far > WINDOW and WINDOW in base:
        rise = base[far] - base[WINDOW]
        verb = "collapses past" if rise > NOTABLE else "does not collapse past"
        lines.append(
            f"The base model {verb} its window of {WINDOW:,}: {base[WINDOW]:.2f} there, {base[far]:.2f} at {far:,}."
        )
    lines.append(f"{trained.title} at {far:,}: {trained.losses[far]:.2f}; {_change(base[far], trained.losses[far])}.")
    inside = [length for length in base if length <= WINDOW]
    if inside:
        near = max(inside)
        change = _change(base[near], trained.losses[near])
        lines.append(
            f"Inside the old window, at {near:,}: {base[near]:.2f} before, {trained.losses[near]:.2f} after; {change}."
        )
    if "untrained" in columns:
        alone = columns["untrained"].losses[far]
        lines.append(
            f"Scaling the positions without any training already gives {alone:.2f} at {far:,}; only the difference "
            f"from there to {trained.losses[far]:.2f} comes from the training."
        )
    for where, lengths in (
        ("the old window", [n for n in base if n <= WINDOW]),
        ("inputs beyond it", [n for n in base if n > WINDOW]),
    ):
        if lengths:
            others = [column for name, column in columns.items() if name != "base"]
            after = ", ".join(f"{column.title} {column.recalled(lengths)}" for column in others)
            lines.append(f"Facts recalled in {where}: base {columns['base'].recalled(lengths)}, {after}.")
    lines.append(_control(columns, main_run, control, far))
    return lines


def _change(before: float, after: float) -> str:
    difference = after - before
    if abs(difference) < NOTABLE:
        return f"no notable change ({difference:+.2f})"
    return f"{'better' if difference < 0 else 'worse'} by {abs(difference):.2f}"


def _control(columns: dict[str, Column], main_run: Knobs, control: Knobs, far: int) -> str:
    if control.method not in columns:
        return (
            "The control, the same amount of training without a terminal prompt, was not run here: run `make "
            "demo-control` with the same knobs. Until then no gain above is attributable to the terminal prompt."
        )
    if main_run.method not in columns:
        return "EndPrompt itself was not run with these knobs: `make demo`."
    ours, other = columns[main_run.method].losses[far], columns[control.method].losses[far]
    difference = other - ours
    verdict = (
        "the two cannot be told apart, so no gain is attributable to the terminal prompt"
        if abs(difference) < NOTABLE
        else f"EndPrompt is {'better' if difference > 0 else 'worse'} by {abs(difference):.2f} in this one run"
    )
    name = "The control, the same amount of training without a terminal prompt,"
    return f"{name} at {far:,}: {other:.2f} against {ours:.2f}; {verdict}."


def limits(main_run: Knobs) -> list[str]:
    """The limits of the numbers, whatever they are."""
    lines = [
        f"One model of 135M, {main_run.steps} steps of 1,024 tokens, one passage, some twenty facts: not the paper's "
        f"result, and differences under {NOTABLE} nats or of a few facts mean little.",
        "A low loss far out does not prove that the model used the far text: the nearest few hundred tokens suffice.",
    ]
    if main_run.target > LONGEST_READ:
        lines.append(
            f"Real inputs end at {LONGEST_READ:,} tokens here; from there to {main_run.target:,} the report has only "
            "the probe of virtual distances, with 512 tokens whose positions jump."
        )
    return lines
