#!/usr/bin/env python3
"""Run a study: a grid of recipes with equal token budgets and one evaluation, compared on one page.

python tools/study.py STUDY.yaml                      # what is not done yet, then the comparison
python tools/study.py STUDY.yaml --list               # the cells, and what is done of each
python tools/study.py STUDY.yaml --only pose --slurm  # as a Slurm array, a task a cell
python tools/study.py STUDY.yaml --report-only --markdown PAGE.md
python tools/study.py study.json                      # the page of a comparison that is stored, as Markdown

Killed at any moment, the same command goes on. Exit codes: 0 done, 2 wrong input, 75 stopped and resumable, 1 a cell
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
    parser.add_argument("study", metavar="STUDY", type=Path, help="study.yaml, or the study.json of one")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this cell or row; repeatable")
    parser.add_argument("--list", action="store_true", help="only print the cells")
    parser.add_argument("--again", action="store_true", help="make cells anew whose settings have changed")
    parser.add_argument("--slurm", action="store_true", help="submit an array instead: slurm/study.sh")
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: print the commands")
    parser.add_argument("--report-only", action="store_true", help="run nothing: compare what is done")
    parser.add_argument("--no-report", action="store_true", help="compare nothing, as the tasks of an array")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the comparison there")
    options = parser.parse_args()
    if options.dry_run and not options.slurm:
        raise InputError("--dry-run: requires --slurm; --list shows which stages are left")

    from endprompt_megatron.study import study_command

    return study_command.run(options)


if __name__ == "__main__":
    run_cli(main)
