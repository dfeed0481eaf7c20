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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The examples as they stand, and the defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" and "(default: False)" tell nobody anything.
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--hf", type=Path, metavar="DIR", help="the (extended) Hugging Face model")
    parser.add_argument("--suite", default="perplexity,needle,virtual", help="what to measure, with commas")
    parser.add_argument("--lengths", required=True, help="real input lengths in tokens, ascending: 4096,8192,...")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="answers, results.json and plots")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="the model before extension, measured beside it")
    parser.add_argument("--beyond-window", action="store_true", help="measure past a model's window too")
    parser.add_argument("--seed", type=int, default=0, help="of keys, probes and questions")

    group = parser.add_argument_group("how the model is run")
    group.add_argument("--engine", default="transformers", help="transformers, vllm or megatron")
    group.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    group.add_argument("--threads", type=int, help="CPU threads; by default all")
    group.add_argument("--megatron", type=Path, metavar="DIR", help="RUN/checkpoints instead of --hf: nothing exported")
    group.add_argument("--iteration", type=int, metavar="N", help="of --megatron; by default the newest")
    group.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor parallelism of megatron and vllm")
    group.add_argument("--pipeline", type=int, metavar="P", help="of megatron; by default what the ranks leave")
    group.add_argument("--processes", type=int, default=1, metavar="N", help="start N ranks on this machine")

    group = parser.add_argument_group("one evaluation by several processes")
    group.add_argument("--part", metavar="I/N", help="ask every N-th question only; array: as a Slurm array's task")
    group.add_argument("--merge", action="store_true", help="ask nothing: make the tables of what all parts stored")

    group = parser.add_argument_group("perplexity, needle, recall and virtual")
    group.add_argument("--text", metavar="FILE", help="held-out text: a UTF-8 file, or PREFIX of a prepared dataset")
    group.add_argument("--windows", type=int, default=2, help="inputs a length for perplexity")
    group.add_argument("--scored", type=int, default=512, help="tokens scored at the end of each perplexity input")
    group.add_argument("--stride", type=int, help="also slide the model's window over the longest inputs, by so many")
    group.add_argument("--samples", type=int, default=1, help="prompts a cell, of passkey and recall")
    group.add_argument("--depths", default="0.1,0.5,0.9", help="where the passkey stands, as shares of the filler")
    group.add_argument("--needle-lengths", metavar="LENGTHS", help="other lengths for the passkey than --lengths")
    group.add_argument("--filler", choices=("noise", "text"), default="noise", help="what the passkey hides in")
    group.add_argument("--recall-distances", metavar="LENGTHS", help="how far facts are away; by default powers of 2")
    group.add_argument("--recall-form", metavar="FILE", help="JSON: what facts and questions look like")
    group.add_argument("--physical", type=int, default=512, help="tokens a row of the virtual-distance probe")
    group.add_argument("--distances", help="virtual lengths to probe; by default powers of 2 up to the window")
    group.add_argument("--probe-samples", type=int, default=8, help="rows of the virtual-distance probe")

    group = parser.add_argument_group("ruler, longbench and short")
    group.add_argument("--template", choices=("base", "chat"), default="base", help="how questions are put")
    group.add_argument(
        "--ruler-template", metavar="NAME", help="one of RULER's, such as meta-llama3, instead of --template"
    )
    group.add_argument("--ruler-tasks", metavar="NAMES", help="some of the 13; by default all")
    group.add_argument("--ruler-samples", type=int, default=500, metavar="N", help="questions a task and length")
    group.add_argument("--haystack", metavar="FILE", help="essays for RULER's haystack; without it a named substitute")
    group.add_argument("--squad", metavar="FILE", help="SQuAD dev-v2.0.json, for RULER's qa_1")
    group.add_argument("--hotpotqa", metavar="FILE", help="HotpotQA dev-distractor JSON, for RULER's qa_2")
    group.add_argument("--english-words", metavar="FILE", help="word list for RULER's cwe at 128K and above")
    group.add_argument("--punkt", metavar="DIR", help="NLTK's punkt_tab/english, which splits RULER's essays")
    group.add_argument("--ruler-seed", type=int, default=42, metavar="N", help="NVIDIA's is 42")
    group.add_argument("--longbench-e", action="store_true", help="LongBench-E: 13 tasks, scores by length in words")
    group.add_argument("--longbench-data", metavar="PATH", help="LongBench's data.zip, or the directory with its files")
    group.add_argument("--longbench-tasks", metavar="NAMES", help="some of the 21; by default all")
    group.add_argument(
        "--short-tasks", metavar="NAMES", help="lm-eval tasks; by default mmlu,gsm8k,hellaswag,humaneval"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only so many questions of each longbench and short task")
    return parser.parse_args()


def main() -> int:
    """Check the command line, measure, print the tables."""
    options = arguments()
    if options.processes < 1:
        raise InputError(f"--processes {options.processes}: should be at least 1")
    if options.processes > 1 and "RANK" not in os.environ:
        from endprompt_megatron.distributed.launch import spawn

        return spawn([__file__, *sys.argv[1:]], options.processes)
    from endprompt_megatron.evaluate.evaluate_command import run

    return run(options)


if __name__ == "__main__":
    run_cli(main)
