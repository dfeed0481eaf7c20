"""Which relative distances a recipe supervises, how often, and the gap: a table, and a picture with --out.

python tools/coverage.py recipes/llama3_8b_64k.yaml
python tools/coverage.py recipes/llama3_8b_64k.yaml context.method=end_prompt_random --out coverage.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.errors import InputError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, dotted")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the coverage here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="for random methods; default: 2000")
    parser.add_argument(
        "--prompt-length", type=int, metavar="B", help="tokens of the prompt, instead of asking the model's tokenizer"
    )
    args = parser.parse_intermixed_args()
    if args.samples < 1:
        raise InputError(f"--samples {args.samples}: should be at least 1")
    if args.out and (args.out.suffix != ".png" or not args.out.absolute().parent.is_dir()):
        raise InputError(f"--out {args.out}: should be a .png in a directory that exists")

    import json

    from endprompt_megatron.config import load_recipe
    from endprompt_megatron.coverage import coverage, draw, table
    from endprompt_megatron.files import disk_errors
    from endprompt_megatron.positions import WITH_PROMPT

    recipe = load_recipe(args.recipe, args.overrides)
    context = recipe.context
    lengths = [args.prompt_length] if args.prompt_length is not None else []
    if context.method in WITH_PROMPT and args.prompt_length is None:
        lengths = _prompt_lengths(recipe.model.hf, context.prompts)
    try:
        result = coverage(
            context.method,
            context.physical,
            context.target,
            lengths,
            samples=args.samples,
            seed=recipe.train.seed,
            chunks=context.chunks,
        )
    except ValueError as error:
        raise InputError(f"{args.recipe}: context.method={context.method}: {error}") from None
    print(json.dumps(result.as_dict(), indent=2) if args.json else table(result))
    if args.out:
        with disk_errors(args.out, "--out"):
            draw(result, args.out)
        if not args.json:
            print(f"drawn: {args.out}")


def _prompt_lengths(hf: str, prompts: list[str]) -> list[int]:
    from endprompt_megatron.prompts import tokenise_prompts

    try:
        return [len(ids) for ids in tokenise_prompts(hf, prompts)]
    except InputError as error:
        raise InputError(f"{error}; --prompt-length B counts without a tokenizer") from None


if __name__ == "__main__":
    run_cli(main)
