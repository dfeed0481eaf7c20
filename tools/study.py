#!/usr/bin/env python3
"""Run a study: a grid of recipes with equal token budgets and one evaluation, compared on one page.

python tools/study.py STUDY.yaml                      # run what is not done yet, then compare
python tools/study.py STUDY.yaml --list               # list the trials and their remaining stages
python tools/study.py STUDY.yaml --only pose --slurm  # submit a Slurm array with one task per trial
python tools/study.py STUDY.yaml --report-only --markdown PAGE.md
python tools/study.py study.json                      # print the page of a stored comparison as Markdown

Killed at any moment, the same command resumes. Exit codes: 0 done, 2 wrong input, 75 stopped and resumable, 1 a trial
failed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


def main() -> int:
    """Check the command line, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", metavar="STUDY", type=Path, help="a study.yaml, or a stored study.json")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only this trial or variant; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="only list the trials")
    parser.add_argument("--again", action="store_true", help="run trials anew whose settings have changed")
    parser.add_argument("--slurm", action="store_true", help="submit slurm/study.sh as an array instead")
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: only print the commands")
    parser.add_argument("--report-only", action="store_true", help="run nothing; compare the trials that are done")
    parser.add_argument("--no-report", action="store_true", help="do not compare, as in the tasks of an array")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the comparison to FILE")
    options = parser.parse_args()
    if options.dry_run and not options.slurm:
        raise InputError("--dry-run: requires --slurm; --list shows which stages are left")

    from endprompt_megatron.study import study_command

    return study_command.run(options)


if __name__ == "__main__":
    run_cli(main)
