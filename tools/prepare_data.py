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
        help=".txt, .jsonl, .ndjson, .json (a record a line, or one array), .parquet; texts and JSON also .gz, .zst, "
        ".xz or .bz2; a directory of them, a glob, or a saved `datasets`",
    )
    parser.add_argument(
        "--manifest", metavar="FILE", help="further inputs, one a line, relative to FILE; or JSON lines"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face directory, or SentencePiece tokenizer.model"
    )
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes; default: one per CPU (mpirun: one per rank)",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field or column with the text; default: text",
    )
    parser.add_argument(
        "--split-blank-lines",
        type=int,
        default=0,
        metavar="N",
        help="split a .txt into documents at N or more blank lines; default: one document per file",
    )
    parser.add_argument("--no-bos", action="store_true", help="write no BOS, even where the model family expects it")
    parser.add_argument("--no-eos", action="store_true", help="write no EOS after documents")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="leave out shorter documents")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave out longer documents")
    parser.add_argument("--dedup", action="store_true", help="keep only the first of documents with the same text")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="put this share of the documents into PREFIX-valid, chosen by a hash of their text",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of --held-out; default: 0")
    parser.add_argument("--skip-bad", action="store_true", help="skip bad input and count it instead of stopping")
    parser.add_argument(
        "--chat",
        nargs="?",
        const=AUTO,
        choices=(AUTO, *FORMATS),
        help="the inputs hold conversations, in this format or in one recognised by its keys; also writes PREFIX.mask",
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="with --chat: a Jinja template instead of the tokenizer's"
    )
    args = parser.parse_args()
    if args.chat is None and args.chat_template is not None:
        raise InputError(f"--chat-template {args.chat_template} applies only with --chat, which is not given")
    given = {
        "--text-field": args.text_field != "text",
        "--split-blank-lines": args.split_blank_lines,
        "--no-bos": args.no_bos,
        "--no-eos": args.no_eos,
    }
    for option in (option for option, on in given.items() if on and args.chat is not None):
        raise InputError(f"{option} applies to texts; with --chat the chat template decides which tokens are written")

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
