"""Tokenise text files into Megatron's indexed dataset: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

python tools/prepare_data.py --input books.txt web.jsonl more.jsonl.gz --tokenizer HF_DIR --out data/corpus
python tools/prepare_data.py --input shards/ --tokenizer HF_DIR --out data/corpus --dedup --held-out 0.01
python tools/prepare_data.py --input chats.jsonl.gz --chat --tokenizer HF_DIR --out data/sft
mpirun -n 64 python tools/prepare_data.py --input 'shards/*.parquet' --tokenizer HF_DIR --out data/corpus
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli
from endprompt_megatron.data.corpus.chat_formats import AUTO, FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help=".txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet; a directory of them, a glob, a saved `datasets`",
    )
    parser.add_argument("--manifest", metavar="FILE", help="more inputs: one a line, relative to FILE, or JSON lines")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face directory, or SentencePiece tokenizer.model"
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a CPU (mpirun: one a rank)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of lines and rows; default: text")
    parser.add_argument(
        "--split-blank-lines",
        type=int,
        default=0,
        metavar="N",
        help="split a .txt into documents where N or more blank lines stand; default: one document a file",
    )
    parser.add_argument("--no-bos", action="store_true", help="no BOS before documents, whatever the family expects")
    parser.add_argument("--no-eos", action="store_true", help="no EOS after documents")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="leave out shorter documents")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave out longer documents")
    parser.add_argument("--dedup", action="store_true", help="of documents with the same text keep the first")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="put this share of the documents into PREFIX-valid, chosen by a hash of their text",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --held-out; default: 0")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what is no document, and count it")
    parser.add_argument(
        "--chat",
        nargs="?",
        const=AUTO,
        choices=(AUTO, *FORMATS),
        help="the inputs hold conversations; their format is recognised by its keys, or named. Also writes PREFIX.mask",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="with --chat: Jinja, in place of the tokenizer's own")
    args = parser.parse_args()
    if args.chat is None and args.chat_template is not None:
        raise InputError(f"--chat-template {args.chat_template}: belongs to --chat")
    given = {
        "--text-field": args.text_field != "text",
        "--split-blank-lines": args.split_blank_lines,
        "--no-bos": args.no_bos,
        "--no-eos": args.no_eos,
    }
    for option in (option for option, on in given.items() if on and args.chat is not None):
        raise InputError(f"{option}: is of texts; with --chat the chat template decides what a conversation becomes")

    from endprompt_megatron.data.corpus.filters import Filters
    from endprompt_megatron.data.corpus.manifest import summary
    from endprompt_megatron.data.corpus.prepare import prepare

    manifest = prepare(
        args.input,
        args.tokenizer,
        args.out,
        manifest=args.manifest,
        workers=args.workers,
        text_field=args.text_field,
        split_blank_lines=args.split_blank_lines,
        bos=not args.no_bos,
        eos=not args.no_eos,
        filters=Filters(args.min_tokens, args.max_tokens, args.dedup, args.held_out, args.seed),
        skip_bad=args.skip_bad,
        chat=args.chat,
        chat_template=args.chat_template,
    )
    if manifest is not None:
        print(summary(args.out, manifest))


if __name__ == "__main__":
    run_cli(main)
