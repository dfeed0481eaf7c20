"""Which relative distances a recipe supervises, how often, and the gap: a table, and a picture with --out.

python tools/coverage.py recipes/llama3_8b_64k.yaml
python tools/coverage.py recipes/llama3_8b_64k.yaml context.method=end_prompt_random --out coverage.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, dotted")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the coverage here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="where samples differ; default: 2000")
    parser.add_argument(
        "--prompt-length", type=int, metavar="B", help="tokens of each prompt and cue, instead of asking a tokenizer"
    )
    args = parser.parse_intermixed_args()
    if args.samples < 1:
        raise InputError(f"--samples {args.samples}: should be at least 1")
    if args.out and (args.out.suffix != ".png" or not args.out.absolute().parent.is_dir()):
        raise InputError(f"--out {args.out}: should be a .png in a directory that exists")

    import json

    from endprompt_megatron.common.files import disk_errors
    from endprompt_megatron.config.load import load_recipe
    from endprompt_megatron.data.samples.terminal_segments import coverage_of
    from endprompt_megatron.method.coverage import draw, table

    recipe = load_recipe(args.recipe, args.overrides)
    try:
        result = coverage_of(recipe, samples=args.samples, prompt_len=args.prompt_length)
    except InputError as error:
        tokenless = args.prompt_length is None and "tokenizer" in str(error)
        mend = "; --prompt-length B counts without a tokenizer" if tokenless else ""
        raise InputError(f"{args.recipe}: {error}{mend}") from None
    print(json.dumps(result.as_dict(), indent=2) if args.json else table(result))
    if args.out:
        with disk_errors(args.out, "--out"):
            draw(result, args.out)
        if not args.json:
            print(f"drawn: {args.out}")


if __name__ == "__main__":
    run_cli(main)
