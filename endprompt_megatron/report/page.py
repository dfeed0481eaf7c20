"""One self-contained HTML page of one or several runs: the recipe, what it cost, what it changed, what is not shown.

Reads RUN/recipe.yaml, metrics.jsonl, data_seen.json and evaluation/results.json, or the results.json of an evaluation
alone; a section whose file is missing says so.  The sections give plain data, which common/html_page.py renders.
"""

from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors, write_text
from endprompt_megatron.common.html_page import Page, render
from endprompt_megatron.report.header import header
from endprompt_megatron.report.limits import footer, not_shown, provenance
from endprompt_megatron.report.models import measured_models
from endprompt_megatron.report.run_files import Runs, read_runs
from endprompt_megatron.report.sections.distance_coverage import distances
from endprompt_megatron.report.sections.measurements import measurements
from endprompt_megatron.report.sections.results import results
from endprompt_megatron.report.sections.training_curves import costs, training


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
        raise InputError(f"--out {path}: {path.parent} is not a directory; create it, or choose another place")
    text = page(runs)
    with disk_errors(path, "--out" if out else "RUN"):
        write_text(path, text)
    return path


def page(runs: Runs) -> str:
    """The whole page as HTML."""
    measured = measured_models(runs)
    sections = [
        results(measured),
        *measurements(measured),
        training(runs),
        costs(runs),
        distances(runs),
        not_shown(runs, measured),
        provenance(runs),
    ]
    return render(
        Page(
            title=f"{', '.join(run.name for run in runs.runs)}: long-context extension",
            sections=[section for section in sections if section is not None],
            footer=footer(runs),
            body="" if runs.several else "one",
            **header(runs),
        )
    )
