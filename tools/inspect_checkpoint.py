"""Describe a checkpoint, Hugging Face's or Megatron's, without loading it.

    python tools/inspect_checkpoint.py PATH [--iteration N] [--tensors] [--check] [--json]

PATH: a Hugging Face directory, a Megatron checkpoint directory (its newest iteration, or N), or one iter_ directory.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--iteration", type=int, metavar="N", help="Megatron iteration (default: the newest)")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with dtype, shape, bytes and shards")
    parser.add_argument("--check", action="store_true", help="read every byte and compare with the recorded CRC-32")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()

    from endprompt_megatron.convert.describe_checkpoint import damage_of, inspect

    contents = inspect(options.path, options.iteration)
    print(contents.as_json() if options.json else contents.page(options.tensors), flush=True)
    if options.check:
        damaged = damage_of(contents)
        if damaged:
            raise InputError(f"{contents.path}: damaged: {'; '.join(damaged)}")
        if not options.json:
            print("  every file has the size and the CRC-32 it was written with")


if __name__ == "__main__":
    run_cli(main)
