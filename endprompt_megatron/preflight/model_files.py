"""The model's files: whether the Hugging Face weights and the converted checkpoint are complete; the tokenizer.

No weights are loaded: the header of a safetensors file (or the list in a .bin file) says how long it is, the manifest
of a checkpoint how long each of its files is.
"""

from dataclasses import replace
from pathlib import Path

from endprompt_megatron.checkpoint import integrity, layout
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.units import format_bytes, format_count
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.convert.hf_weights import HfWeights, entries_of, weight_files
from endprompt_megatron.convert.mapping import mapped_tensors, tied_copy
from endprompt_megatron.data.samples.blend import prompts_used
from endprompt_megatron.data.samples.terminal_segments import recall_of
from endprompt_megatron.method.positions import MAPS, copies, segment_lengths
from endprompt_megatron.method.prompts import tokenise_prompts
from endprompt_megatron.model.shape import ModelShape, read_shape
from endprompt_megatron.preflight.table import FAIL, OK, WARN, Finding, join_names
from endprompt_megatron.tokenizer.vocabulary import check_vocabulary

HF, CONVERTED, TOKENIZER = "HF checkpoint", "converted checkpoint", "tokenizer"


def hf_checkpoint(recipe: Recipe, shape: ModelShape) -> Finding:
    """Whether every shard exists, is as long as its header says and holds the tensors that config.json implies.

    Once the weights are converted, training does not need them here: then missing weights are a warning.
    """
    directory = Path(recipe.model.hf)
    if not weight_files(directory) and converted_at(recipe) is not None:
        return Finding(HF, f"{directory}: only config and tokenizer; the weights are converted already", WARN)
    return _of_files(HF, directory, shape)


def _of_files(check: str, directory: Path, shape: ModelShape) -> Finding:
    files = weight_files(directory)
    missing = [name for name in files if not (directory / name).is_file()]
    damaged = []
    for name in files:
        if name not in missing:
            try:
                entries_of(directory / name)
            except ValueError as error:
                damaged.append(f"{name} ({error})")
    if missing or damaged:
        problems = [f"{len(missing)} of {len(files)} shards missing: {join_names(missing)}"] if missing else []
        problems += [f"{len(damaged)} damaged: {join_names(damaged)}"] if damaged else []
        return Finding(check, f"{directory}: {'; '.join(problems)}; download them again", FAIL)
    weights = HfWeights(directory)
    weights.check(list(mapped_tensors(shape)), tied_copy(shape))
    total = format_bytes(sum((directory / name).stat().st_size for name in files))
    found = f"{len(files)} file{'s' * (len(files) > 1)}, {len(weights.tensors)} tensors, {total}"
    return Finding(check, f"{directory}: {found}, {format_count(shape.parameters)} parameters")


def converted_at(recipe: Recipe) -> Path | None:
    """The Megatron checkpoint that model.init_from names; None if there is none.  Raises InputError if it is broken."""
    if recipe.model.init_from is None or not Path(recipe.model.init_from).exists():
        return None
    if layout.is_hugging_face(Path(recipe.model.init_from)):
        return None
    return layout.find_checkpoint(Path(recipe.model.init_from), flag="model.init_from")


def converted_checkpoint(recipe: Recipe, shape: ModelShape) -> Finding:
    """What training starts from, the run's newest checkpoint or the converted one: complete, and of this model."""
    root = recipe.run_dir / "checkpoints"
    newest = layout.newest_iteration(root)
    if newest is not None:
        from endprompt_megatron.checkpoint.resume import refuse_other_data, refuse_other_recipe
        from endprompt_megatron.data.samples.identity import identity_of

        directory = layout.iteration_dir(root, newest)
        manifest = layout.read_manifest(directory)
        refuse_other_recipe(manifest["recipe"] or {}, recipe, "recipe", directory)
        refuse_other_data(manifest, identity_of(recipe), recipe, "recipe", directory)
        try:
            held = _bytes_of(directory)
        except InputError as error:
            before = layout.complete_iterations(root)[-2:-1]
            if not before:
                raise
            return Finding(CONVERTED, f"{error}: the run falls back to step {before[0]}", WARN)
        resumes = f"the run resumes from step {newest} of {recipe.train.steps}"
        return Finding(CONVERTED, f"{directory}: {format_bytes(held)}; {resumes}")
    if recipe.model.init_from is None:
        raise InputError(
            "model.init_from is missing; set it to what tools/convert_hf_to_megatron.py wrote, or to that of model.hf"
        )
    source = Path(recipe.model.init_from)
    if layout.is_hugging_face(source):
        layout.refuse_other_model(read_shape(source), shape, f"model.init_from={source}")
        found = _of_files(CONVERTED, source, shape)
        return (
            found
            if found.verdict == FAIL
            else replace(found, found=f"not needed: every rank reads its own shards of {source}")
        )
    directory = converted_at(recipe)
    if directory is None:
        return Finding(
            CONVERTED,
            f"model.init_from={source} does not exist yet: tools/convert_hf_to_megatron.py --hf {recipe.model.hf} "
            f"--out {source} writes it; or set it to {recipe.model.hf} itself",
            WARN,
        )
    layout.refuse_other_model(read_shape(directory / layout.HF_DIRECTORY), shape, f"model.init_from={source}")
    try:
        held = _bytes_of(directory)
    except InputError as error:
        raise InputError(f"{error}; convert it again with tools/convert_hf_to_megatron.py") from None
    return Finding(CONVERTED, f"{directory}: {format_bytes(held)}, {shape.num_layers} layers, as model.hf")


def _bytes_of(directory: Path) -> int:
    """Bytes of a checkpoint's files.  Raises InputError if one is missing or has another size."""
    found = list(integrity.damage(directory, only_sizes=True))
    if found:
        raise InputError(f"{directory}: {join_names(found)}; the checkpoint is damaged")
    return sum(file["bytes"] for file in layout.read_manifest(directory)["files"].values())


def tokenizer(recipe: Recipe, shape: ModelShape) -> Finding:
    """Whether its ids have embeddings, and the recipe's end prompts fit the sequence."""
    directory = Path(recipe.model.hf)
    check_vocabulary(directory, shape.vocab_size)
    lengths = context_lengths(recipe, shape)
    prompts = f", end prompts of {join_names(recipe.context.physical - a for a in lengths)} tokens"
    return Finding(
        TOKENIZER,
        f"fits the vocabulary of {shape.vocab_size}" + (prompts if MAPS[recipe.context.method].has_prompt else ""),
        OK,
    )


def context_lengths(recipe: Recipe, shape: ModelShape) -> list[int]:
    """Context tokens of a sample, for each prompt of the recipe and its sources.  Raises InputError if none fit."""
    c = recipe.context
    prompts: list[list[int]] = [[]]
    if MAPS[c.method].has_prompt:
        recall = recall_of(recipe)
        prompts = [] if recall and recall.share == 1 else tokenise_prompts(recipe.model.hf, prompts_used(recipe))
        prompts += [recall.prompt] if recall else []
    count = copies(c.method, **c.knobs)
    highest = max((max(prompt) for prompt in prompts if prompt), default=-1)
    if highest >= shape.vocab_size:
        raise InputError(
            f"context.prompts: token id {highest} is outside the model's vocabulary of {shape.vocab_size}; "
            "the tokenizer belongs to another model"
        )
    try:
        return [segment_lengths(c.method, c.physical, count * len(prompt), c.target)[0] for prompt in prompts]
    except ValueError as error:
        raise InputError(f"context.method={c.method}: {error}") from None
