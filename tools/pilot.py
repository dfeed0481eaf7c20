#!/usr/bin/env python3
"""Try a recipe before it is paid for: RoPE scalings untrained, then short trainings at a few learning rates.

python tools/pilot.py RECIPE.yaml --text HELD_OUT.txt --out DIR [key=value ...]

Measures on your own model and data the base, each scaling without training, and then the best scaling trained for a few
steps, with the recipe's method and with its control: the loss of a passage and the facts recalled, by the length of
the input.  Ends with a table and what it recommends; DIR/pilot.json has both.  Killed at any moment, the same command
goes on.  Exit codes: 0 done, 1 a trial failed, 2 wrong input, 75 stopped and resumable.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


def main() -> int:
    """Check the command line, run, recommend."""
    from endprompt_megatron.config.recipe import ROPE_TYPES
    from endprompt_megatron.evaluate.options import parse_lengths, parse_names
    from endprompt_megatron.study import pilot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", type=Path)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="held-out text, as for evaluate.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--types", default=",".join(pilot.TYPES), help="RoPE scalings (%(default)s)")
    rates = ",".join(f"{rate:g}" for rate in pilot.RATES)
    parser.add_argument("--rates", default=rates, help="learning rates (%(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="of each training (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="inputs that each model reads (%(default)s)")
    parser.add_argument("--passage", type=int, default=512, help="tokens whose loss is taken (%(default)s)")
    parser.add_argument("--lengths", help="of inputs; by default from half the window to the target")
    parser.add_argument("--recall-distances", metavar="LENGTHS", help="as for evaluate.py; by default from near to far")
    parser.add_argument("--recall-form", type=Path, metavar="FILE", help="as for evaluate.py")
    parser.add_argument("--processes", type=int, default=1, help="ranks of a training (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of evaluations (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys")
    args = parser.parse_intermixed_args()
    types = parse_names("--types", args.types)
    if not types:
        raise InputError("--types: names no RoPE scaling; give for example linear,ntk,yarn")
    for name in types:
        if name not in ROPE_TYPES:
            raise InputError(f"--types {name}: no RoPE scaling; choose from {', '.join(ROPE_TYPES)}")
    for flag, number in (("--tokens", args.tokens), ("--samples", args.samples), ("--passage", args.passage)):
        if number < 1:
            raise InputError(f"{flag} {number}: should be at least 1")
    return pilot.run(
        pilot.Asked(
            args.recipe,
            tuple(args.overrides),
            args.out,
            args.text,
            types=tuple(types),
            rates=tuple(_rates(args.rates)),
            tokens=args.tokens,
            samples=args.samples,
            passage=args.passage,
            lengths=tuple(parse_lengths("--lengths", args.lengths) if args.lengths else ()),
            distances=tuple(
                parse_lengths("--recall-distances", args.recall_distances) if args.recall_distances else ()
            ),
            form=args.recall_form,
            processes=args.processes,
            dtype=args.dtype,
        )
    )


def _rates(given: str) -> list[float]:
    try:
        rates = [float(each) for each in given.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(rate > 0 for rate in rates):
        raise InputError(f"--rates {given}: should be numbers above 0, such as 2e-5,1e-4")
    return rates


if __name__ == "__main__":
    run_cli(main)
