"""A study's comparison as files: study.json, study.md and study.html say the same."""

import re
from pathlib import Path

from endprompt_megatron.common.files import disk_errors, write_text
from endprompt_megatron.common.html_page import Cell, Figure, Page, Paragraph, Row, Section, Table, note, render
from endprompt_megatron.evaluate.registry import SUITES
from endprompt_megatron.study.chart import curves, number_axis
from endprompt_megatron.study.compare import as_json
from endprompt_megatron.study.comparison_tables import (
    POSITIONS,
    ScoreTable,
    choice_title,
    distance_of,
    groups,
    key_of,
    known_keys,
    metric_of,
    tables,
)


def write(comparison: dict, out: Path, markdown_file: Path | None = None) -> list[Path]:
    """Write study.json, study.md and study.html into `out`, and the Markdown also to `markdown_file`."""
    markdown = as_markdown(comparison)
    texts = {
        out / "study.json": as_json(comparison),
        out / "study.md": markdown,
        out / "study.html": as_html(comparison),
    }
    if markdown_file is not None:
        texts[markdown_file] = markdown
    for path, text in texts.items():
        with disk_errors(path, "--markdown" if path == markdown_file else "out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
    return list(texts)


def as_markdown(comparison: dict) -> str:
    """The page in Markdown."""
    parts = [f"# {comparison['title']}", comparison["about"].strip(), _missing(comparison)]
    for table in tables(comparison):
        parts += [f"## {table.title}", table.note, _markdown(table)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _missing(comparison: dict) -> str:
    left = comparison["missing"]
    return f"Not done yet, and therefore not in the tables: {', '.join(left)}." if left else ""


def _markdown(table: ScoreTable) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)]]
    for line, row in enumerate(table.rows):
        lines.append([f"**{cell}**" if (line, column) in table.marks else cell for column, cell in enumerate(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_html(comparison: dict) -> str:
    """The page as one file, with the curves of what has several lengths or positions."""
    pictures = _pictures(comparison)
    paragraphs = [*comparison["about"].strip().split("\n\n"), _missing(comparison)]
    return render(
        Page(
            title=comparison["title"],
            heading=comparison["title"],
            kind="Study",
            introduction=[Paragraph(text) for text in paragraphs if text],
            sections=[_section(table, pictures.get(table.title)) for table in tables(comparison)],
        )
    )


def _section(table: ScoreTable, picture: Figure | None) -> Section:
    rows = [
        Row(row[0], [Cell(text, strong=(line, column) in table.marks) for column, text in enumerate(row) if column])
        for line, row in enumerate(table.rows)
    ]
    shown = Table(table.header[1:], rows, first=table.header[0])
    key = re.sub(r"\W+", "-", table.title.lower()).strip("-")
    return Section(key, table.title, [*note([table.note]), *([picture] if picture else []), shown])


def _pictures(comparison: dict) -> dict[str, Figure | None]:
    """Curves by the title of the table that they stand above: scores whose columns are numbers, losses by position."""
    order, found = [variant["name"] for variant in comparison["rows"]], {}
    if comparison.get("sweep"):
        found[choice_title(comparison)] = _sweep_picture(comparison["sweep"], choice_title(comparison), order)
    for title, keys in groups(known_keys(comparison, "scores")):
        metric = metric_of(keys[0])
        longest = max(key[2] for key in keys)
        distances = {key: distance_of(key) for key in keys if distance_of(key) is not None and key[2] == longest}
        x_name = "distance, tokens" if distances else "length of the input, tokens"
        x_of = distances or {key: key[2] for key in keys if key[2]}
        if len(set(x_of.values())) < len(x_of):  # several tasks
            continue
        lines = {}
        for variant in comparison["rows"]:
            at = {key_of(score): score["mean"] for score in variant["scores"]}
            lines[variant["name"]] = sorted((x, metric.scale * at[key]) for key, x in x_of.items() if key in at)
        found[title] = curves(title, x_name, metric.unit, lines, order)
    lines = {
        variant["name"]: [((each["start"] + each["end"]) / 2, each["loss"]) for each in variant["by_position"]]
        for variant in comparison["rows"]
        if variant["by_position"]
    }
    if lines:
        found[POSITIONS] = curves(POSITIONS, "position, tokens", "nats", lines, order)
    return found


def _sweep_picture(sweep: dict, title: str, order: list[str]) -> Figure | None:
    """Development scores over the levels, where these are numbers; untrained models as level lines."""
    of = sweep["measure"]
    metric = SUITES[of["suite"]].metric(of["metric"])
    try:
        lines = {
            row["name"]: sorted((float(level), metric.scale * value) for level, value in row["scores"].items())
            for row in sweep["rows"]
        }
    except ValueError:
        return None
    places = sorted({x for points in lines.values() for x, _ in points})
    if len(places) < 2:
        return None
    for name, value in sweep["untrained"].items():
        lines[name] = [(x, metric.scale * value) for x in (places[0], places[-1])]
    known = [*order, *(name for name in lines if name not in order)]
    return curves(title, sweep["over"], metric.unit, lines, known, number_axis)
