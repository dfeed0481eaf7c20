"""Measure a model on long inputs, and a baseline beside it: perplexity, passkey retrieval, virtual distance."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.errors import InputError, run_cli


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--hf", required=True, type=Path, metavar="DIR", help="the (extended) Hugging Face model")
    parser.add_argument("--suite", default="perplexity,needle,virtual", help="what to measure, with commas")
    parser.add_argument("--lengths", required=True, help="real input lengths in tokens, ascending: 4096,8192,...")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="results.json and the plots go here")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="the model before extension, measured beside it")
    parser.add_argument("--text", metavar="FILE", help="held-out text: a UTF-8 file, or PREFIX of a prepared dataset")
    parser.add_argument("--windows", type=int, default=2, help="inputs a length for perplexity")
    parser.add_argument("--scored", type=int, default=512, help="tokens scored at the end of each perplexity input")
    parser.add_argument("--samples", type=int, default=1, help="passkey prompts a cell")
    parser.add_argument("--depths", default="0.1,0.5,0.9", help="where the passkey stands, as shares of the filler")
    parser.add_argument("--needle-lengths", metavar="LENGTHS", help="other lengths for the passkey than --lengths")
    parser.add_argument("--filler", choices=("noise", "text"), default="noise", help="what the passkey hides in")
    parser.add_argument("--physical", type=int, default=512, help="tokens a row of the virtual-distance probe")
    parser.add_argument("--distances", help="virtual lengths to probe; by default powers of 2 up to the window")
    parser.add_argument("--probe-samples", type=int, default=8, help="rows of the virtual-distance probe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--threads", type=int, help="CPU threads; by default all")
    return parser.parse_args()


def main() -> None:
    """Check the command line, measure, print the tables."""
    options = arguments()
    from endprompt_megatron.evaluate.suite import Settings, evaluate, parse_numbers, parse_suites

    for name in ("windows", "scored", "samples", "physical", "probe_samples", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: should be at least 1")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: should not be negative")
    settings = Settings(
        suites=parse_suites(options.suite),
        lengths=parse_numbers("--lengths", options.lengths),
        text=options.text,
        windows=options.windows,
        scored=options.scored,
        depths=parse_numbers("--depths", options.depths, float),
        samples=options.samples,
        filler=options.filler,
        needle_lengths=options.needle_lengths and parse_numbers("--needle-lengths", options.needle_lengths),
        physical=options.physical,
        distances=options.distances and parse_numbers("--distances", options.distances),
        probe_samples=options.probe_samples,
        seed=options.seed,
        dtype=options.dtype,
    )
    import torch

    from endprompt_megatron import runtime
    from endprompt_megatron.evaluate.progress import bar
    from endprompt_megatron.evaluate.tables import terminal

    runtime.quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    with bar() as progress:
        results = evaluate(
            settings, options.hf, options.out, baseline=options.baseline, device=runtime.device(), progress=progress
        )
    print(terminal(results))
    print(f"\n{results['seconds']:.0f} s; {options.out / 'results.json'} and the plots beside it")


if __name__ == "__main__":
    run_cli(main)
