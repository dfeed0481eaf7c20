"""A study's comparison as files: study.json, study.md and study.html say the same."""

from html import escape
from pathlib import Path

from endprompt_megatron.common.files import disk_errors, write_text
from endprompt_megatron.study.chart import curves
from endprompt_megatron.study.compare import as_json
from endprompt_megatron.study.comparison_tables import (
    POSITIONS,
    Table,
    all_keys,
    form,
    groups,
    key_of,
    tables,
)


def write(comparison: dict, out: Path, markdown_file: Path | None = None) -> list[Path]:
    """Write study.json, study.md and study.html into `out`, and the Markdown to a place of one's own too."""
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
    return f"Not done yet, and not in the tables: {', '.join(left)}." if left else ""


def _markdown(table: Table) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)]]
    for line, row in enumerate(table.rows):
        lines.append([f"**{cell}**" if (line, column) in table.marks else cell for column, cell in enumerate(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_html(comparison: dict) -> str:
    """The page as one file, with the curves of what has several lengths or positions."""
    from endprompt_megatron.report.style import CSS

    pictures = _pictures(comparison)
    body = [f"<h1>{escape(comparison['title'])}</h1>"]
    paragraphs = [*comparison["about"].strip().split("\n\n"), _missing(comparison)]
    body += [f"<p>{escape(text)}</p>" for text in paragraphs if text]
    for table in tables(comparison):
        body += [f"<h2>{escape(table.title)}</h2>", f'<p class="note">{escape(table.note)}</p>']
        body += [pictures.get(table.title, ""), _html(table)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(comparison['title'])}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _pictures(comparison: dict) -> dict[str, str]:
    """Curves by the title of the table that they stand above: scores whose columns are numbers, losses by position."""
    order, found = [row["name"] for row in comparison["rows"]], {}
    for title, keys in groups(all_keys(comparison, "scores")):
        scale, _ = form(keys[0][3])
        longest = max(key[2] for key in keys)
        distances = {key: int(key[1]) for key in keys if key[1].isdigit() and key[2] == longest}
        x_name = "distance, tokens" if distances else "length of the input, tokens"
        x_of = distances or {key: key[2] for key in keys if key[2]}
        if len(set(x_of.values())) < len(x_of):  # several tasks
            continue
        lines = {}
        for row in comparison["rows"]:
            at = {key_of(score): score["mean"] for score in row["scores"]}
            lines[row["name"]] = sorted((x, scale * at[key]) for key, x in x_of.items() if key in at)
        found[title] = curves(title, x_name, "nats" if scale == 1 else "percent", lines, order)
    lines = {
        row["name"]: [((each["start"] + each["end"]) / 2, each["loss"]) for each in row["by_position"]]
        for row in comparison["rows"]
        if row["by_position"]
    }
    if lines:
        found[POSITIONS] = curves(POSITIONS, "position, tokens", "nats", lines, order)
    return found


def _html(table: Table) -> str:
    def cell(text: str, marked: bool) -> str:
        return f"<b>{escape(text)}</b>" if marked else escape(text)

    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{cell(text, (line, column) in table.marks)}</td>" for column, text in enumerate(row) if column)
        + "</tr>"
        for line, row in enumerate(table.rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
