"""Convert a Megatron-Core distributed checkpoint to a Hugging Face directory.

    python tools/convert_megatron_to_hf.py --megatron RUN/checkpoints --out DIR [--iteration N] [--workers 8] [--verify]

The newest complete iteration is exported unless --iteration names one; --megatron may also be an iter_ directory.
The result holds weights, config, tokenizer and a model card, and loads in transformers and vLLM unchanged.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Hugging Face directory to create")
    parser.add_argument("--iteration", type=int, metavar="N", help="iteration to export (default: the newest)")
    parser.add_argument("--dtype", help="cast to bfloat16, float16 or float32 (default: the dtype of the training)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="size of a weight file (default: 5GB)")
    parser.add_argument("--workers", type=int, metavar="N", help="writing processes (default: one per CPU, at most 8)")
    parser.add_argument(
        "--adapter", action="store_true", help="write LoRA's adapters alone, in PEFT's format, instead of merging them"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="where model.init_from has moved to, for checkpoints of longlora.save_frozen=false",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare all tensors afterwards; if OUT exists, just that"
    )
    options = parser.parse_args()

    if options.adapter:
        for option, given in (("--verify", options.verify), ("--dtype", options.dtype is not None)):
            if given:
                raise InputError(f"{option} applies to a model; --adapter writes what was trained, as it is")
        from endprompt_megatron.convert.peft_adapter import convert_megatron_to_peft

        print(convert_megatron_to_peft(options.megatron, options.out, options.iteration), flush=True)
        return
    from endprompt_megatron.convert.to_hf import convert_megatron_to_hf

    first = True
    if not (options.verify and options.out.exists()):
        written = convert_megatron_to_hf(
            options.megatron,
            options.out,
            options.iteration,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            workers=options.workers,
            base=options.base,
        )
        first = written is not None
        if first:
            print(written, flush=True)
    if options.verify and first:
        from endprompt_megatron.convert.verify import verify

        print(
            verify(
                options.out,
                options.megatron,
                options.iteration,
                to_hf=True,
                workers=options.workers,
                base=options.base,
            )
        )


if __name__ == "__main__":
    run_cli(main)
