"""Tokenise text files into Megatron's indexed dataset: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

python tools/prepare_data.py --input books.txt web.jsonl more.jsonl.gz --tokenizer HF_DIR --out data/corpus
mpirun -n 64 python tools/prepare_data.py --input shards/*.parquet --tokenizer HF_DIR --out data/corpus
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".txt, .jsonl, .jsonl.gz, .parquet")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face directory, or SentencePiece tokenizer.model"
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a CPU (mpirun: one a rank)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of .jsonl and .parquet; default: text")
    parser.add_argument(
        "--split-blank-lines",
        type=int,
        default=0,
        metavar="N",
        help="split a .txt into documents where N or more blank lines stand; default: one document a file",
    )
    parser.add_argument("--no-bos", action="store_true", help="no BOS before documents, whatever the family expects")
    parser.add_argument("--no-eos", action="store_true", help="no EOS after documents")
    args = parser.parse_args()

    from endprompt_megatron.data.prepare import prepare

    manifest = prepare(
        args.input,
        args.tokenizer,
        args.out,
        workers=args.workers,
        text_field=args.text_field,
        split_blank_lines=args.split_blank_lines,
        bos=not args.no_bos,
        eos=not args.no_eos,
    )
    if manifest is not None:
        empty = f", {manifest['empty_documents']} empty texts left out" if manifest["empty_documents"] else ""
        print(f"{args.out}: {manifest['documents']} documents, {manifest['tokens']} tokens{empty}")


if __name__ == "__main__":
    run_cli(main)
