"""What tools/study.py does: list the trials, run them here, submit them to Slurm, compare them."""

import argparse
import os
import subprocess
from pathlib import Path

from endprompt_megatron.common.errors import EXIT_DONE, InputError
from endprompt_megatron.common.files import disk_errors, read_json, write_text
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.study.grid import Study, Trial, read_study
from endprompt_megatron.study.sweeps import final_trials, phases
from endprompt_megatron.study.trial import DEVELOP, EVALUATE, Work

ROOT = Path(__file__).resolve().parents[2]  # of the repository


def run(options: argparse.Namespace) -> int:
    """Do what the options ask; returns the exit code.  Raises InputError."""
    if options.study.suffix == ".json":
        for name in ("only", "list", "again", "slurm", "no_report"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')}: applies only to a study.yaml, not to {options.study}")
        return render(options.study, options.markdown)
    study = read_study(options.study)
    trials = study.chosen(options.only)
    if options.list:
        print(listing(study, trials))
        return EXIT_DONE
    if options.slurm:
        return submit(study, trials, again=options.again, dry_run=options.dry_run)
    if not options.report_only:
        from endprompt_megatron.study.runner import run as run_trials

        code = run_trials(study, trials, again=options.again)
        if code != EXIT_DONE or options.no_report:
            return code
    from endprompt_megatron.study.compare import compare
    from endprompt_megatron.study.pages import write

    comparison = compare(study)
    written = write(comparison, study.out, options.markdown)
    print("\n".join(map(str, written)))
    return EXIT_DONE


def render(stored: Path, markdown: Path | None) -> int:
    """Write the page of a stored comparison as Markdown, or print it.  Raises InputError."""
    from endprompt_megatron.study.pages import as_markdown

    try:
        page = as_markdown(read_json(stored, "a stored comparison (study.json)"))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{stored}: not a comparison written by this tool ({error!r})") from None
    if markdown is None:
        print(page, end="")
        return EXIT_DONE
    with disk_errors(markdown, "--markdown"):
        write_text(markdown, page)
    print(markdown)
    return EXIT_DONE


def listing(study: Study, trials: list[Trial]) -> str:
    """One line per trial: what it trains on and which stages are left."""
    final = final_trials(study)
    rows = []
    for trial in trials:
        recipe, trains = trial.recipe, ["-"] * 3
        if trial.trained:
            trains = [f"{trial.tokens:,}", f"{recipe.train.steps:,}", f"{recipe.context.physical:,}"]
        rows.append([trial.name, *trains, _state(study, trial, trial in final)])
    return text_table(["trial", "tokens", "steps", "physical", "state"], rows)


def _state(study: Study, trial: Trial, is_final: bool) -> str:
    """What is left of a trial, in words."""
    tried = study.choose is not None and study.choose.is_tried(trial.levels)
    if not tried and not is_final:
        return "only if chosen"
    last = [DEVELOP] * tried + [EVALUATE] * is_final
    left = list(dict.fromkeys(stage for each in last for stage in Work(study, trial, each).left))
    return "done" if not left else f"{', '.join(left)} left"


def submit(study: Study, trials: list[Trial], *, again: bool, dry_run: bool) -> int:
    """Submit an array with one task per trial that is not done, and the comparison after it.  Raises InputError.

    A study that chooses is submitted twice: the trials of its second phase follow from the first.
    """
    left = [trial for trial in trials if study.choose is None or study.choose.is_tried(trial.levels)]
    if not dry_run:
        from endprompt_megatron.study.runner import works_of

        for last, those in phases(study, trials):
            left = [work.trial for work in works_of(study, those, again, last) if work.left]
            if left:
                break
        study.out.mkdir(parents=True, exist_ok=True)
    if not left:
        print("all trials are done; compare them with --report-only")
        return EXIT_DONE
    names = ":".join(trial.name for trial in left)
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
    print(f"job {job}: {len(left)} trials; job {after}: their comparison, in {study.out}")
    return EXIT_DONE


def _sbatch(command: list[str], settings: dict[str, str]) -> str:
    """The job's number.  Raises InputError where there is no Slurm, or it refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    except FileNotFoundError:
        raise InputError("--slurm: sbatch was not found; omit the option, or submit from the cluster") from None
    if done.returncode != EXIT_DONE:
        raise InputError(f"--slurm: sbatch refused ({' '.join(done.stderr.split())})")
    return done.stdout.strip().split(";")[0]
