"""One self-contained HTML page of one or several runs: the recipe, what it cost, what it changed, what is not shown.

Reads RUN/recipe.yaml, metrics.jsonl, data_seen.json and evaluation/results.json, or the results.json of an evaluation
alone; a section whose file is missing says so.  The page fetches nothing: style and pictures are inside, and its
Content-Security-Policy forbids the rest.
"""

import re
from html import escape
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors, write_text
from endprompt_megatron.report.header import header
from endprompt_megatron.report.html import Figures
from endprompt_megatron.report.limits import not_shown, provenance
from endprompt_megatron.report.load import Runs, read_runs
from endprompt_megatron.report.models import measured_models
from endprompt_megatron.report.sections.distances import distances
from endprompt_megatron.report.sections.long_inputs import passkey, recall, text_quality, virtual
from endprompt_megatron.report.sections.results import results
from endprompt_megatron.report.sections.ruler_tables import ruler
from endprompt_megatron.report.sections.task_scores import longbench, short_text
from endprompt_megatron.report.sections.training_curves import costs, training
from endprompt_megatron.report.style import CSS

# Nothing is loaded, whatever is in the page; styles and pictures are inside.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(directories: list[Path], control: Path | None = None, out: Path | None = None) -> Path:
    """Write the page and return its path: `out`, by default RUN/report.html, of several runs beside the first one.

    Raises InputError (see read_runs), and where the page cannot be written.
    """
    runs = read_runs(directories, control)
    first = directories[0]
    path = out or (first.resolve().parent if runs.several else first) / "report.html"
    if path.is_dir():
        raise InputError(f"--out {path}: is a directory; name the file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: {path.parent} is no directory; make it, or choose another place")
    text = page(runs)
    with disk_errors(path, "--out" if out else "RUN"):
        write_text(path, text)
    return path


def page(runs: Runs) -> str:
    """The whole page as HTML."""
    figures, measured = Figures(), measured_models(runs)
    sections = [
        results(runs, measured),
        text_quality(measured, figures),
        passkey(measured),
        recall(measured),
        virtual(runs, measured, figures),
        ruler(measured),
        longbench(measured),
        short_text(measured),
        training(runs, figures),
        costs(runs),
        distances(runs, figures),
        not_shown(runs, measured),
        provenance(runs),
    ]
    body = "\n".join([header(runs), contents(sections), *sections])
    title = ", ".join(run.name for run in runs.runs)
    kind = "" if runs.several else ' class="one"'
    return re.sub(
        r"\n{3,}",
        "\n\n",
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}: long-context extension</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body{kind}>\n<main>\n{body}\n</main>\n</body>\n</html>\n",
    )


def contents(sections: list[str]) -> str:
    """Links to the sections, from their ids and headings."""
    found = [match for part in sections for match in re.findall(r'<section id="(\w+)"><h2>([^<]*)</h2>', part)]
    return "<nav>" + " ".join(f'<a href="#{key}">{title}</a>' for key, title in found) + "</nav>"
