#!/usr/bin/env python3
"""Measure a model on long inputs, and a baseline beside it: RULER, LongBench, passkey, perplexity, virtual distance.

python tools/evaluate.py --hf RUN/hf --baseline DIR --suite ruler,perplexity --lengths 4096,8192 --text FILE --out OUT
python tools/evaluate.py --engine megatron --megatron RUN/checkpoints --processes 2 --tensor 2 ... --out OUT
python tools/evaluate.py ... --out OUT --part 0/4      # and 1/4, 2/4, 3/4 elsewhere; the last one makes the tables

Killed, the same command goes on where it stopped.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli
from endprompt_megatron.evaluate.registry import GENERAL, SUITES, all_options


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The examples as they stand, and the defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" and "(default: False)" tell nobody anything.
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def command_line() -> argparse.ArgumentParser:
    """The parser: what concerns the evaluation as a whole, and the options of every suite of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--hf", type=Path, metavar="DIR", help="the (extended) Hugging Face model")
    parser.add_argument(
        "--suite", default="perplexity,needle,virtual", help=f"what to measure, some of {', '.join(SUITES)}"
    )
    parser.add_argument("--lengths", required=True, help="lengths of real inputs in tokens, ascending: 4096,8192,...")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="answers, results.json and plots")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="the model before extension, measured beside it")
    for option in GENERAL:
        option.add_to(parser)

    group = parser.add_argument_group("how the model is run")
    group.add_argument("--threads", type=int, help="CPU threads; by default all")
    group.add_argument("--megatron", type=Path, metavar="DIR", help="RUN/checkpoints instead of --hf: nothing exported")
    group.add_argument("--iteration", type=int, metavar="N", help="iteration of --megatron; by default the newest")
    group.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor parallelism of megatron and vllm")
    group.add_argument(
        "--pipeline", type=int, metavar="P", help="pipeline parallelism of megatron; by default what the ranks leave"
    )
    group.add_argument("--processes", type=int, default=1, metavar="N", help="start N ranks on this machine")

    group = parser.add_argument_group("one evaluation by several processes")
    group.add_argument("--part", metavar="I/N", help="ask every N-th question only; array: as a Slurm array's task")
    group.add_argument("--merge", action="store_true", help="ask nothing: make the tables of what all parts stored")

    users = {name: [s.name for s in SUITES.values() if option in s.options] for name, option in all_options().items()}
    shared = parser.add_argument_group("options of several suites")
    for name, option in all_options().items():
        if len(users[name]) > 1:
            replace(option, help=f"{option.help} ({', '.join(users[name])})").add_to(shared)
    for suite in SUITES.values():
        group = parser.add_argument_group(f"suite {suite.name}", suite.about)
        for option in suite.options:
            if len(users[option.name]) == 1:
                option.add_to(group)
    return parser


def main() -> int:
    """Check the command line, measure, print the tables."""
    options = command_line().parse_args()
    if options.processes < 1:
        raise InputError(f"--processes {options.processes}: should be at least 1")
    if options.processes > 1 and "RANK" not in os.environ:
        from endprompt_megatron.distributed.launch import spawn

        return spawn([__file__, *sys.argv[1:]], options.processes)
    from endprompt_megatron.evaluate.evaluate_command import run

    return run(options)


if __name__ == "__main__":
    run_cli(main)
