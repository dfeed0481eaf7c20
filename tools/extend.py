#!/usr/bin/env python3
"""Train a recipe: extend the context window of a converted checkpoint."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Start it with torchrun, srun or mpirun, or by itself with --processes. On SIGTERM, SIGUSR1 and SIGUSR2 "
        "it writes a checkpoint and exits with 75; the same command then resumes. Exit codes: 0 done, 2 wrong input, "
        "75 stopped, can be resumed, 1 anything else.",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to override, such as train.steps=100"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="start N ranks on this machine")
    args = parser.parse_intermixed_args()  # overrides may come before and after --processes

    from endprompt_megatron.config.constraints.check import load_checked
    from endprompt_megatron.config.load import load_recipe

    if args.processes < 1:
        raise InputError(f"--processes {args.processes}: should be at least 1")
    if args.processes > 1 and "RANK" not in os.environ:
        from endprompt_megatron.distributed.launch import spawn

        # Check here, so that an error is reported once and not by every rank.
        load_checked(args.recipe, args.overrides, world_size=args.processes)
        return spawn([__file__, args.recipe, *args.overrides, "--processes", str(args.processes)], args.processes)
    recipe = load_recipe(args.recipe, args.overrides)
    from endprompt_megatron.distributed.signals import StopSignal

    # From here on a signal leads to a checkpoint and exit code 75, even while libraries are still being imported.
    with StopSignal().listening() as stop:
        from endprompt_megatron.distributed.runtime import quiet_libraries

        quiet_libraries()
        from endprompt_megatron.train import train

        return train(recipe, args.recipe, stop)


if __name__ == "__main__":
    run_cli(main)
