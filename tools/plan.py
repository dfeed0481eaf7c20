"""Plan a recipe before it runs: memory per GPU, time of a step, GPU-hours, and the cost of full-length training.

python tools/plan.py recipes/llama3_70b_64k.yaml --nodes 8
python tools/plan.py recipes/llama3_70b_64k.yaml --search --nodes 8 --gpu h200
python tools/plan.py recipes/llama3_8b_64k.yaml parallel.recompute=full --json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli

GPUS_PER_NODE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to override")
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="number of nodes, with 8 GPUs each; default: the fewest GPUs on which the layout fits",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="number of GPUs, instead of --nodes")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help="kind of GPU: h100 (default), h200, a100 or b200")
    parser.add_argument(
        "--search", action="store_true", help="list the fastest layouts for --nodes that are legal and fit"
    )
    parser.add_argument(
        "--disk", type=float, default=5.0, metavar="GB/s", help="what all ranks together write to checkpoint.dir [5]"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    args = parser.parse_intermixed_args()
    for option, value in (("--nodes", args.nodes), ("--world-size", args.world_size)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: should be at least 1")
    if not args.disk > 0:
        raise InputError(f"--disk {args.disk:g}: should be above 0, in GB/s")
    if args.nodes and args.world_size:
        raise InputError(f"--nodes {args.nodes} and --world-size {args.world_size}: give one of them")
    gpus = args.world_size or (args.nodes * GPUS_PER_NODE if args.nodes else None)
    if args.search and gpus is None:
        raise InputError("--search needs the number of GPUs: add --nodes N")

    import json

    from endprompt_megatron.config.load import load_recipe
    from endprompt_megatron.config.resolve import resolve
    from endprompt_megatron.distributed.hardware import of_kind
    from endprompt_megatron.model.published_shapes import shape_for
    from endprompt_megatron.plan.plan import make_plan
    from endprompt_megatron.plan.plan_page import page, search_table
    from endprompt_megatron.plan.search import search

    hardware = of_kind(args.gpu)
    recipe = load_recipe(args.recipe, args.overrides)
    shape, published = shape_for(recipe.model.hf, args.recipe)
    resolve(recipe, shape)
    if not args.search:
        plan = make_plan(recipe, args.recipe, shape, hardware, gpus, published, args.disk * 1e9)
        print(json.dumps(plan.as_dict(), indent=2) if args.json else page(plan))
        return
    found = search(shape, recipe, hardware, gpus)
    if not found:
        raise InputError(f"{args.recipe}: no layout of {gpus} {hardware.gpu.name} is legal and fits; use more GPUs")
    if args.json:
        print(json.dumps([estimate.as_dict() for estimate in found], indent=2))
    else:
        print(search_table(recipe, args.recipe, found, gpus, hardware.gpu.name))


if __name__ == "__main__":
    run_cli(main)
