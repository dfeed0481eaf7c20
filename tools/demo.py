#!/usr/bin/env python3
"""Extend SmolLM2-135M on this machine, end to end; `make demo` and `make demo-control` call this."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import run_cli
from endprompt_megatron.demo import assets, execution, stages, summary


def main() -> int | None:
    """Run the demo or one of its helper commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, default=16384, help="the new window in tokens (16384)")
    parser.add_argument("--steps", type=int, default=32, help="training steps of two 512-token sequences (32)")
    parser.add_argument("--control", action="store_true", help="train without a terminal prompt, for comparison")
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="directory that the demo writes to (demo)")
    parser.add_argument("--assets", action="store_true", help="only fetch the model and the text")
    parser.add_argument("--interpolate", type=Path, metavar="HF", help="only link HF's weights under another config")
    parser.add_argument("--as", dest="like", type=Path, metavar="HF", help="with --interpolate: take its config.json")
    parser.add_argument("--out", type=Path, help="with --interpolate: the directory to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as optim.lr=1e-4")
    args = parser.parse_intermixed_args()
    if args.assets:
        from endprompt_megatron.evaluate.suites.ruler.sources import fetch_defaults

        assets.fetch(args.dir / "assets")
        fetch_defaults(print)
        return None
    if args.interpolate:
        if not (args.like and args.out):
            parser.error("--interpolate needs --as and --out")
        execution.interpolate(args.interpolate, args.like, args.out)
        return None
    shared = dict(directory=args.dir, dtype=stages.fast_dtype(), overrides=tuple(args.overrides))
    main_run = stages.Knobs(args.target, args.steps, "end_prompt", **shared)
    control = stages.Knobs(args.target, args.steps, "short", **shared)
    if args.control:
        evaluated = (stages.ROOT / main_run.run / "evaluation" / "results.json").is_file()
        code = execution.run(control, beside=main_run.run if evaluated else None)
    else:
        code = execution.run(main_run)
    if code == 0:
        summary.show(main_run, control)
    return code


if __name__ == "__main__":
    run_cli(main)
