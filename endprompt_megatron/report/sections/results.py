"""What one would quote: the table of everything measured, and what differs by more than the noise."""

from endprompt_megatron.common.html_page import Block, Cell, Details, Row, Section, Table, missing, note
from endprompt_megatron.evaluate.registry import SUITES, Headline, Key, Suite
from endprompt_megatron.report.models import Measured, Model, against_control
from endprompt_megatron.report.sections import cells

EVALUATE = "python tools/evaluate.py --hf RUN/hf --baseline DIR --lengths 4096,8192 --text FILE --out RUN/evaluation"


def results(measured: Measured) -> Section:
    """The table one would quote: a column a model, a row a number."""
    if not measured.models:
        words = f"No evaluation yet. Run `{EVALUATE}`, then this report again."
        return Section("results", "Results", [missing(words)])
    rows = [row for suite in SUITES.values() for row in _rows(suite, measured)]
    shown = [cell for row in rows for cell in row.cells]
    notes = []
    if any(cell.small for cell in shown):
        notes.append(cells.LEGEND)
    if any("*" in cell.text for cell in shown):
        notes.append(cells.INCOMPLETE)
    notes += [line for suite in SUITES.values() for line in measured.left_out(suite)]
    table = Table([model.name for model in measured.models], rows, columns=[model.key for model in measured.models])
    return Section("results", "Results", [table, *note(notes), *_differences(measured)])


def quoted(suite: Suite, model: Model) -> list[Headline]:
    """The numbers that a suite quotes of a model."""
    own = {key: score for key, score in model.scores.items() if key[0] == suite.name}
    return suite.headlines(model.measured[suite.name], own)


def _rows(suite: Suite, measured: Measured) -> list[Row]:
    """A row for each number that the suite quotes of any model, by task and length."""
    by_model = {model.key: {each.label: each for each in quoted(suite, model)} for model in measured.of(suite)}
    every = {label: each for of_model in by_model.values() for label, each in of_model.items()}
    tasks = list(dict.fromkeys(each.key[1] for each in every.values()))
    labels = sorted(every, key=lambda label: (tasks.index(every[label].key[1]), every[label].key[2]))

    def cell(model: Model, label: str) -> Cell:
        found = by_model.get(model.key, {}).get(label)
        return cells.headline(model, found) if found else Cell(cells.NONE)

    return [Row(label, [cell(model, label) for model in measured.models]) for label in labels]


def _differences(measured: Measured) -> list[Details]:
    """Each run minus what was there before, and minus the control: the means open, everything folded."""
    parts = []
    for model in measured.models:
        if model.against and model is not measured.control:
            words = "request by request" if any(each["p"] is not None for each in model.against.values()) else ""
            parts += _of_pair(f"{model.name} minus before", model.against, words)
        if measured.control is not None and model.label == "extended" and model.key not in ("untrained", "control"):
            found = against_control(model, measured.control)
            words = "from the two intervals, as if their requests were not the same, which hides small differences"
            parts += _of_pair(f"{model.name} minus control", found, words)
    return parts


def _of_pair(title: str, compared: dict[Key, dict], words: str) -> list[Details]:
    if not compared:
        return []
    beyond = sum(each["beyond_noise"] for each in compared.values())
    means = {key: each for key, each in compared.items() if _is_quoted(key)}
    aside = f", {words}" if words else ""
    caption = f"{title}: {beyond} of {len(compared)} differences are larger than the noise (95%{aside})."
    blocks: list[Block] = [_changes(means or compared)]
    if len(compared) > len(means) > 0:
        blocks.append(Details("all of them", [_changes(compared)], printed=False))
    return [Details(caption, blocks)]


def _is_quoted(key: Key) -> bool:
    suite = SUITES[key[0]]
    return key[1] in (suite.quoted_tasks or suite.means) and key[3] == suite.metrics[0].name


def _changes(compared: dict[Key, dict]) -> Table:
    return Table(["change, in points", "samples"], [_row(key, each) for key, each in compared.items()])


def _row(key: Key, compared: dict) -> Row:
    suite, task, length, metric_name = SUITES[key[0]], *key[1:]
    metric = suite.metric(metric_name)
    what = " ".join(filter(None, [suite.title, suite.task_name(task)]))
    where = f", {length:,} tokens" if length else ""
    named = metric.unit if metric.unit != "percent" else metric.name if len(suite.metrics) > 1 else ""
    return Row(", ".join(filter(None, [f"{what}{where}", named])), [cells.change(compared), f"{compared['samples']:,}"])
