"""tools/study.py behind its command line: list, run here, submit to Slurm, compare."""

import argparse
import os
import subprocess
from pathlib import Path

from endprompt_megatron.common.errors import EXIT_DONE, InputError
from endprompt_megatron.common.files import disk_errors, read_json, write_text
from endprompt_megatron.evaluate.tables import table
from endprompt_megatron.study.grid import Cell, Study, read_study
from endprompt_megatron.study.trial import Work

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code.  Raises InputError."""
    if options.study.suffix == ".json":
        for name in ("only", "list", "again", "slurm", "no_report"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')}: is of a study.yaml, not of {options.study}")
        return render(options.study, options.markdown)
    study = read_study(options.study)
    cells = study.chosen(options.only)
    if options.list:
        print(listing(study, cells))
        return EXIT_DONE
    if options.slurm:
        return submit(study, cells, again=options.again, dry_run=options.dry_run)
    if not options.report_only:
        from endprompt_megatron.study.runner import run as run_cells

        code = run_cells(study, cells, again=options.again)
        if code != EXIT_DONE or options.no_report:
            return code
    from endprompt_megatron.study.compare import compare
    from endprompt_megatron.study.pages import write

    comparison = compare(study)
    written = write(comparison, study.out, options.markdown)
    print("\n".join(map(str, written)))
    return EXIT_DONE


def render(stored: Path, markdown: Path | None) -> int:
    """The page of a comparison that is stored: Markdown to a file, or printed.  Raises InputError."""
    from endprompt_megatron.study.pages import as_markdown

    try:
        page = as_markdown(read_json(stored, "a stored comparison (study.json)"))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{stored}: not a comparison that this tool wrote ({error!r})") from None
    if markdown is None:
        print(page, end="")
        return EXIT_DONE
    with disk_errors(markdown, "--markdown"):
        write_text(markdown, page)
    print(markdown)
    return EXIT_DONE


def listing(study: Study, cells: list[Cell]) -> str:
    """A line a cell: what it trains on and what is done of it."""
    rows = []
    for cell in cells:
        work, recipe = Work(study, cell), cell.recipe
        trains = ["-"] * 3
        if cell.trained:
            trains = [f"{cell.tokens:,}", f"{recipe.train.steps:,}", f"{recipe.context.physical:,}"]
        left = work.left
        rows.append([cell.name, *trains, "done" if not left else f"{', '.join(left)} left"])
    return table(["cell", "tokens", "steps", "physical", "state"], rows)


def submit(study: Study, cells: list[Cell], *, again: bool, dry_run: bool) -> int:
    """An array with a task a cell that is not done, and the comparison after it.  Raises InputError."""
    left = cells
    if not dry_run:
        from endprompt_megatron.study.runner import works_of

        left = [work.cell for work in works_of(study, cells, again) if work.left]
        study.out.mkdir(parents=True, exist_ok=True)
    if not left:
        print("all cells are done; --report-only compares them")
        return EXIT_DONE
    names = ":".join(cell.name for cell in left)
    script = str(ROOT / "slurm" / "study.sh")
    at_once = f"%{study.parallel}" if study.parallel > 1 else ""
    array = ["sbatch", "--parsable", f"--array=0-{len(left) - 1}{at_once}", script]
    report = ["sbatch", "--dependency=afterany:JOB", script]
    common = {"STUDY": str(study.path), "STUDY_OUT": str(study.out)}
    settings = {**common, "STUDY_CELLS": names}
    if dry_run:
        print(" ".join([f"{name}={value}" for name, value in settings.items()] + array))
        print(" ".join([*(f"{name}={value}" for name, value in common.items()), *report]))
        return EXIT_DONE
    job = _sbatch(array, settings)
    report[1] = f"--dependency=afterany:{job}"
    after = _sbatch([report[0], "--parsable", *report[1:]], {**common, "STUDY_CELLS": ""})
    print(f"job {job}: {len(left)} cells; job {after}: their comparison, into {study.out}")
    return EXIT_DONE


def _sbatch(command: list[str], settings: dict[str, str]) -> str:
    """The job's number.  Raises InputError where there is no Slurm, or it refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    except FileNotFoundError:
        raise InputError("--slurm: there is no sbatch here; leave it out, or submit from the cluster") from None
    if done.returncode != EXIT_DONE:
        raise InputError(f"--slurm: sbatch refused ({' '.join(done.stderr.split())})")
    return done.stdout.strip().split(";")[0]
