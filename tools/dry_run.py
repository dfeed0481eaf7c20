#!/usr/bin/env python3
"""Run one training step of a recipe at one rank of a cluster that is not there.

    python tools/dry_run.py RECIPE.yaml --nodes 8 [--rank 0] [key=value ...]

The project's own model, optimizer, schedule and update run on tensors that hold nothing, with the choices that a GPU
makes: what the rank would allocate, send and compute, beside what tools/plan.py says.  Needs no GPU.  Transformer
Engine's layers are not built: torch's stand for them.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli

GPUS_PER_NODE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to override")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes, with 8 GPUs each [1]")
    parser.add_argument("--world-size", type=int, metavar="N", help="number of GPUs, instead of --nodes")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose step it is [0]")
    parser.add_argument("--micro-batches", type=int, metavar="N", help="of the step [those of the global batch]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    parser.add_argument("--html", metavar="FILE", help="write pictures of memory and traffic too, one HTML page")
    args = parser.parse_intermixed_args()
    world_size = args.world_size if args.world_size is not None else args.nodes * GPUS_PER_NODE
    for option, value in (
        ("--nodes", args.nodes),
        ("--world-size", world_size),
        ("--micro-batches", args.micro_batches),
    ):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: should be at least 1")
    if not 0 <= args.rank < world_size:
        raise InputError(f"--rank {args.rank}: should be 0 to {world_size - 1}")

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there has no part in it
    import json

    from endprompt_megatron.dry_run.dry_run_page import as_dict, page
    from endprompt_megatron.dry_run.rank_step import dry_run
    from endprompt_megatron.dry_run.target import target_of

    target = target_of(args.recipe, args.overrides, world_size, args.micro_batches)
    if args.html and not Path(args.html).resolve().parent.is_dir():
        raise InputError(f"--html {args.html}: {Path(args.html).parent} is not a directory")
    step = dry_run(target.recipe, target.export_config, target.shape, args.rank, world_size)
    if args.html:
        from endprompt_megatron.common.files import disk_errors, write_text
        from endprompt_megatron.dry_run.dry_run_picture import html

        with disk_errors(Path(args.html), "--html"):
            write_text(Path(args.html), html(step, target))
    print(json.dumps(as_dict(step, target), indent=2) if args.json else page(step, target))


if __name__ == "__main__":
    run_cli(main)
