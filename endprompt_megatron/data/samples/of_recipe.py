"""The datasets that a recipe asks for: what data.*, context.* and train.* mean for build_datasets.

Apart from feed.py so that tools which look at data need neither Megatron nor process groups.
"""

from pathlib import Path
from typing import Any

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.samples.blend import is_split, sources_of
from endprompt_megatron.data.samples.builder import SampleSpec
from endprompt_megatron.data.samples.dataset import Dataset, DataSpec, WeightedDataset, build_datasets
from endprompt_megatron.data.samples.terminal_segments import recall_of
from endprompt_megatron.method.positions import MAPS
from endprompt_megatron.method.prompts import tokenise_prompts


def datasets_of(
    recipe: Recipe, where: str, vocab_size: int | None, cache: Path | str | None, valid_samples: int = 0
) -> tuple[Dataset, Dataset | None]:
    """The recipe's training and validation datasets (build_datasets).  Raises InputError.

    `vocab_size` is the model's, `cache` the directory for large indices; None checks and keeps nothing.
    """
    train_samples = recipe.train.steps * recipe.train.global_batch_size
    return build_datasets(
        sample_spec(recipe),
        data_spec(recipe, where),
        train_samples,
        valid_samples,
        vocab_size=vocab_size,
        tokenizer=recipe.model.hf,
        cache_dir=cache,
    )


def sample_spec(recipe: Recipe) -> SampleSpec:
    """What a sample of the recipe is, its prompts tokenised.  Raises InputError."""
    c = recipe.context
    with_prompt = MAPS[c.method].has_prompt
    return SampleSpec(
        method=c.method,
        physical_len=c.physical,
        target_len=c.target,
        prompts=tokenise_prompts(recipe.model.hf, list(c.prompts)) if with_prompt else [],
        prompt_loss_weight=c.prompt_loss_weight,
        seed=recipe.train.seed,
        recall=recall_of(recipe) if with_prompt else None,
        knobs=c.knobs,
    )


def data_spec(recipe: Recipe, where: str) -> DataSpec:
    """Where the recipe's samples come from, the prompts of its sources tokenised.  Raises InputError."""
    d = recipe.data
    split = d.valid is None or is_split(d.valid)
    return DataSpec(
        train=_blend_of(d.train, f"{where}: data.train", recipe),
        valid=d.valid if split else _blend_of(d.valid, f"{where}: data.valid", recipe),
        document_ends=d.document_ends,
        min_document_tokens=d.min_document_tokens,
        content_skip=recipe.context.content_skip,
        packing=d.packing,
        align=d.align or 1,
        kind=d.kind,
        long=d.long,
    )


def _blend_of(value: Any, key: str, recipe: Recipe) -> list[WeightedDataset]:
    """data.train or data.valid with the prompts that sources have of their own as token ids."""
    blend = []
    for source in sources_of(value, key):
        prompts = None
        if source.prompts is not None and MAPS[recipe.context.method].has_prompt:
            prompts = tokenise_prompts(recipe.model.hf, list(source.prompts), f"{key}: prompts of {source.prefix}")
        blend.append(WeightedDataset(source.prefix, source.weight, prompts))
    return blend
