"""Look at what a run will train on: samples as text and as a picture, and whether the documents suit the method.

python tools/inspect_data.py recipes/llama3_8b_64k.yaml [key=value ...] --picture sample.png
python tools/inspect_data.py --prefix data/train --tokenizer models/Meta-Llama-3-8B
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.common.errors import InputError, run_cli

_ROWS = 6  # of a picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, dotted")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="how many to show; default: 1")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="index of the first one; default: 0")
    parser.add_argument("--picture", type=Path, metavar="PNG", help=f"draw the samples into this file, at most {_ROWS}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    parser.add_argument("--prefix", metavar="PREFIX", help="look at a dataset by itself, without a recipe")
    parser.add_argument("--tokenizer", metavar="DIR", help="with --prefix: the tokenizer that decodes it")
    args = parser.parse_intermixed_args()
    if args.samples < 0:
        raise InputError(f"--samples {args.samples}: should be at least 0")
    if (args.recipe is None) == (args.prefix is None):
        raise InputError("give a RECIPE.yaml, or --prefix PREFIX with --tokenizer DIR")
    if args.picture and (args.picture.suffix != ".png" or not args.picture.absolute().parent.is_dir()):
        raise InputError(f"--picture {args.picture}: should be a .png in a directory that exists")
    if args.picture and (args.prefix or not 1 <= args.samples <= _ROWS):
        raise InputError(f"--picture {args.picture} draws 1 to {_ROWS} samples of a recipe (--samples)")
    if args.prefix:
        _documents(args)
    else:
        _samples(args)


def _samples(args: argparse.Namespace) -> None:
    import json

    from endprompt_megatron.common.files import disk_errors
    from endprompt_megatron.config.constraints.check import check_data
    from endprompt_megatron.config.load import load_recipe
    from endprompt_megatron.config.resolve import resolve
    from endprompt_megatron.data.describe.describe_data import look, page
    from endprompt_megatron.data.samples.of_recipe import datasets_of
    from endprompt_megatron.model.shape import read_shape
    from endprompt_megatron.tokenizer import load_tokenizer

    recipe = load_recipe(args.recipe, args.overrides)
    check_data(recipe, args.recipe)
    shape = read_shape(recipe.model.hf)
    resolve(recipe, shape)
    # The run's own cache of large indices serves here too, and is left as it is.
    cache = Path(recipe.data.cache or recipe.run_dir / "index")
    dataset, _ = datasets_of(recipe, args.recipe, shape.vocab_size, cache if cache.is_dir() else None)
    looked = look(recipe.context, recipe.data, dataset, load_tokenizer(recipe.model.hf), args.start, args.samples)
    print(json.dumps(looked, indent=2, ensure_ascii=False) if args.json else page(looked, recipe.data.document_ends))
    if args.picture:
        from endprompt_megatron.data.describe.picture import draw

        with disk_errors(args.picture, "--picture"):
            draw(dataset, [sample["sample"] for sample in looked["samples"]], recipe.context, args.picture)
        if not args.json:
            print(f"\nwrote {args.picture}")


def _documents(args: argparse.Namespace) -> None:
    import json

    from endprompt_megatron.data.describe.describe_data import documents_page, look_at_documents
    from endprompt_megatron.tokenizer import load_tokenizer

    if args.tokenizer is None:
        raise InputError(f"--prefix {args.prefix} needs --tokenizer DIR, to decode its tokens")
    looked = look_at_documents(args.prefix, load_tokenizer(args.tokenizer), args.start, args.samples)
    print(json.dumps(looked, indent=2, ensure_ascii=False) if args.json else documents_page(looked, args.prefix))


if __name__ == "__main__":
    run_cli(main)
