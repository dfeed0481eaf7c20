"""Make RUN/report.html: one self-contained page of a run's recipe, losses, evaluation and limits."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.errors import run_cli


def main() -> None:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory that extend.py wrote")
    parser.add_argument("--control", type=Path, metavar="RUN2", help="a run to stand beside it, method `short`")
    options = parser.parse_args()
    from endprompt_megatron.report.page import write_report

    print(write_report(options.run, options.control))


if __name__ == "__main__":
    run_cli(main)
