"""What one would quote: the table of everything measured, and what differs by more than the noise."""

from collections.abc import Callable

from endprompt_megatron.common import html_page
from endprompt_megatron.common.html_page import Cell, Details, Section, Table, missing, note
from endprompt_megatron.report.load import Runs
from endprompt_megatron.report.models import Key, Measured, Model, against_control
from endprompt_megatron.report.sections import cells
from endprompt_megatron.report.sections.cells import NONE

EVALUATE = "python tools/evaluate.py --hf RUN/hf --baseline DIR --lengths 4096,8192 --text FILE --out RUN/evaluation"
SUITES = {
    "perplexity": "perplexity",
    "needle": "passkey",
    "virtual": "virtual distance",
    "ruler": "RULER",
    "longbench": "LongBench",
    "short": "short text",
}
_MEANS = ("mean", "mean_16", "mean_21", "all depths", "by_length", "repeat")
_METRICS = dict.fromkeys(SUITES, "score") | {"perplexity": "loss", "needle": "accuracy", "virtual": "accuracy"}
Row = tuple[str, Callable[[Model], Cell]]


def results(runs: Runs, measured: Measured) -> Section:
    """The table one would quote: a column a model, a row a number."""
    if not measured.models:
        words = f"No evaluation yet. Run `{EVALUATE}`, then this report again."
        return Section("results", "Results", [missing(words)])
    rows = [
        row for of_suite in (_perplexity, _needle, _virtual, _ruler, _longbench, _short) for row in of_suite(measured)
    ]
    models = measured.models
    body = [html_page.Row(name, [cell(model) for model in models]) for name, cell in rows]
    shown = [cell for row in body for cell in row.cells]
    notes = [_scored(measured)]
    if any(cell.small for cell in shown):
        notes.append(cells.LEGEND)
    if any("*" in cell.text for cell in shown):
        notes.append("* Not over all tasks and questions: see below.")
    notes += [line for suite in SUITES for line in measured.left_out(suite)]
    table = Table([model.name for model in models], body, columns=[model.key for model in models])
    return Section("results", "Results", [table, *note(notes), *_differences(measured)])


def _scored(measured: Measured) -> str:
    models = measured.of("perplexity")
    if not models:
        return ""
    first = models[-1].measured["perplexity"]
    windows = len(first["by_length"][0]["windows"])
    return (
        f"Perplexity of the last {first['scored']} tokens of {windows} held-out "
        f"{'inputs' if windows > 1 else 'input'} of that real length; all lengths score the same tokens."
    )


def _only(models: list[Model], cell: Callable[[Model], Cell]) -> Callable[[Model], Cell]:
    """`cell` for `models`; the others have none."""
    return lambda model: cell(model) if any(model is other for other in models) else Cell(NONE)


def _perplexity(measured: Measured) -> list[Row]:
    models = measured.of("perplexity")

    def at(length: int) -> Callable[[Model], Cell]:
        def cell(model: Model) -> Cell:
            entries = {entry["length"]: entry for entry in model.measured["perplexity"]["by_length"]}
            return cells.perplexity(model, entries[length]) if length in entries else Cell(NONE)

        return _only(models, cell)

    lengths = sorted({entry["length"] for m in models for entry in m.measured["perplexity"]["by_length"]})
    return [(f"Perplexity, {length:,} tokens", at(length)) for length in lengths]


def _needle(measured: Measured) -> list[Row]:
    models = measured.of("needle")

    def at(length: int) -> Callable[[Model], Cell]:
        def cell(model: Model) -> Cell:
            there = [each for each in model.measured["needle"]["cells"] if each["length"] == length]
            if not there:
                return Cell(NONE)
            found = sum(round(each["accuracy"] * each["samples"]) for each in there)
            key = ("needle", "all depths", length, "accuracy")
            return cells.counted(model, key, f"{found} of {sum(each['samples'] for each in there)}")

        return _only(models, cell)

    lengths = sorted({each["length"] for model in models for each in model.measured["needle"]["cells"]})
    return [(f"Passkeys found, {length:,} tokens", at(length)) for length in lengths]


def _virtual(measured: Measured) -> list[Row]:
    models = measured.of("virtual")
    if not models:
        return []
    furthest = max(int(distance) for model in models for distance in model.measured["virtual"]["repeat"])

    def cell(model: Model) -> Cell:
        entry = model.measured["virtual"]["repeat"].get(str(furthest))
        key = ("virtual", "repeat", furthest, "accuracy")
        return cells.counted(model, key, f"{entry['accuracy']:.0%}") if entry else Cell(NONE)

    return [(f"Recalled at virtual length {furthest:,}", _only(models, cell))]


def _ruler(measured: Measured) -> list[Row]:
    models = measured.of("ruler")
    lengths = {
        length for model in models for suite, task, length, _ in model.scores if (suite, task) == ("ruler", "mean")
    }

    def at(length: int) -> Callable[[Model], Cell]:
        return _only(models, lambda model: cells.percent(model, ("ruler", "mean", length, "score")))

    return [(f"RULER, {length:,} tokens", at(length)) for length in sorted(lengths - {0})]


def _longbench(measured: Measured) -> list[Row]:
    models = measured.of("longbench")
    names = {"mean_16": "LongBench, 16 tasks", "mean_21": "LongBench, 21 tasks"}

    def of(task: str) -> Callable[[Model], Cell]:
        def cell(model: Model) -> Cell:
            mean = model.measured["longbench"].get(task) or {}
            return cells.percent(model, ("longbench", task, 0, "score"), complete=bool(mean.get("complete")))

        return _only(models, cell)

    return [(name, of(task)) for task, name in names.items() if models]


def _short(measured: Measured) -> list[Row]:
    models = measured.of("short")

    def of(model: Model) -> Cell:
        complete = model.measured["short"]["mean"]["complete"]
        return cells.percent(model, ("short", "mean", 0, "score"), complete=complete)

    cell = _only(models, of)
    return [("Short text, mean", cell)] if models else []


def _differences(measured: Measured) -> list[Details]:
    """Each run minus what was there before, and minus the control: the means open, everything folded."""
    parts = []
    for model in measured.models:
        if model.against and model is not measured.control:
            words = "question by question" if any(each["p"] is not None for each in model.against.values()) else ""
            parts += _of_pair(f"{model.name} minus before", model.against, words)
        if measured.control is not None and model.label == "extended" and model.key not in ("untrained", "control"):
            found = against_control(model, measured.control)
            words = "from the two intervals, as if the questions were others: harder to tell apart than they are"
            parts += _of_pair(f"{model.name} minus control", found, words)
    return parts


def _of_pair(title: str, compared: dict[Key, dict], words: str) -> list[Details]:
    if not compared:
        return []
    beyond = sum(each["beyond_noise"] for each in compared.values())
    means = {key: each for key, each in compared.items() if key[1] in _MEANS and key[3] == _METRICS[key[0]]}
    aside = f", {words}" if words else ""
    caption = f"{title}: {beyond} of {len(compared)} differences are larger than the noise (95%{aside})."
    blocks: list[html_page.Block] = [_changes(means or compared)]
    if len(compared) > len(means) > 0:
        blocks.append(Details("all of them", [_changes(compared)], printed=False))
    return [Details(caption, blocks)]


def _changes(compared: dict[Key, dict]) -> Table:
    return Table(["change, in points", "samples"], [_row(key, each) for key, each in compared.items()])


def _row(key: Key, compared: dict) -> html_page.Row:
    suite, task, length, metric = key
    names = {"by_length": "", "all depths": "", "repeat": "recalling", "continue": "going on"}
    what = " ".join(filter(None, [SUITES.get(suite, suite), names.get(task, task.replace("_", " "))]))
    unit = {"loss": ", nats", "score": ""}.get(metric, f", {metric}")
    where = f", {length:,} tokens" if length else ""
    return html_page.Row(f"{what}{where}{unit}", [cells.change(compared), f"{compared['samples']:,}"])
