"""Write one self-contained HTML page about runs: recipe, cost, losses, evaluation beside published scores, limits.

python tools/report.py RUN
python tools/report.py RUN --control SHORT_RUN
python tools/report.py RUN_A RUN_B RUN_C --out compared.html
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import run_cli


def main() -> None:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run directory of extend.py, or the --out of evaluate.py"
    )
    parser.add_argument(
        "--control", type=Path, metavar="RUN2", help="the control to show beside them, a run of method `short`"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page; default: RUN/report.html, or report.html beside the first RUN for several",
    )
    options = parser.parse_intermixed_args()
    from endprompt_megatron.report.page import write_report

    print(write_report(options.runs, options.control, options.out))


if __name__ == "__main__":
    run_cli(main)
