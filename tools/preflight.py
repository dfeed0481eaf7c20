#!/usr/bin/env python3
"""Check a recipe, its files and the machines before training: one table, one verdict.

srun --ntasks-per-node=8 python tools/preflight.py recipes/llama3_70b_64k.yaml   (or torchrun: one rank a GPU)
python tools/preflight.py recipes/llama3_8b_64k.yaml   (one process: what it can check)
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 ready, 2 a check failed or the input is wrong. docs/preflight.md explains every check.",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to override")
    parser.add_argument(
        "--checkpoints", type=int, metavar="N", help="check free space for N checkpoints; default: those that are kept"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="number of processes of the run; default: those started"
    )
    parser.add_argument(
        "--gpu",
        metavar="KIND",
        help="check the recipe for this kind of GPU (h100, h200, a100, b200); default: this machine",
    )
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="directory of the export; default: on RUN's file system"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="how long to wait for other ranks; default: 120"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_intermixed_args()
    # Before torch is loaded: its sockets log C++ frames about errors that are reported here in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    for name in ("checkpoints", "world_size", "timeout"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: should be above 0")

    import json

    from endprompt_megatron.distributed.hardware import of_kind
    from endprompt_megatron.preflight.checks import Options, leave, run
    from endprompt_megatron.preflight.table import as_json, as_table, verdict_line

    if args.gpu is not None:
        of_kind(args.gpu)  # report a wrong kind before anything waits
    options = Options(args.checkpoints, args.world_size, args.export, args.gpu, args.timeout)
    outcome = run(args.recipe, args.overrides, options)
    if outcome.findings:
        found = outcome.findings
        print(json.dumps(as_json(found), indent=2) if args.json else f"{as_table(found)}\n{verdict_line(found)}")
    leave(outcome)
    return outcome.code


if __name__ == "__main__":
    run_cli(main)
