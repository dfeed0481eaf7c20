"""Convert a Hugging Face LLaMA checkpoint to a Megatron-Core distributed checkpoint.

    python tools/convert_hf_to_megatron.py --hf DIR --out DIR [--dtype bfloat16]

Weights keep their dtype unless --dtype says otherwise.  Any tensor, pipeline and context parallel layout can load
the result.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="directory with config.json and weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to make")
    parser.add_argument("--dtype", help="cast to bfloat16, float16 or float32 (default: as they are)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that write (default: one a CPU, at most 8)")
    options = parser.parse_args()

    from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

    written = convert_hf_to_megatron(options.hf, options.out, options.dtype, options.workers)
    if written is not None:
        print(written)


if __name__ == "__main__":
    run_cli(main)
