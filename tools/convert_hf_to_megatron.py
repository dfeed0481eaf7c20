"""Convert a Hugging Face LLaMA checkpoint to a Megatron-Core distributed checkpoint.

    python tools/convert_hf_to_megatron.py --hf DIR --out DIR [--dtype bfloat16] [--workers 8] [--verify]

Under mpirun or srun every rank writes its share.  After a kill, the same command continues.

Weights keep their dtype unless --dtype is given.  Any tensor, pipeline and context parallel layout can load the result.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="directory with config.json and weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to create")
    parser.add_argument("--dtype", help="cast to bfloat16, float16 or float32 (default: keep the dtype)")
    parser.add_argument("--workers", type=int, metavar="N", help="writing processes (default: one per CPU, at most 8)")
    parser.add_argument(
        "--verify", action="store_true", help="compare all tensors afterwards; if OUT exists, just that"
    )
    options = parser.parse_args()

    from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

    first = True
    if not (options.verify and options.out.exists()):
        written = convert_hf_to_megatron(options.hf, options.out, options.dtype, options.workers)
        first = written is not None
        if first:
            print(written, flush=True)
    if options.verify and first:
        from endprompt_megatron.convert.verify import verify

        print(verify(options.hf, options.out, to_hf=False, workers=options.workers))


if __name__ == "__main__":
    run_cli(main)
