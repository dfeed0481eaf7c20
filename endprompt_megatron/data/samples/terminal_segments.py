"""What the samples of a recipe end with, and which distances they supervise: method/prompts.py and coverage.py for it.

No torch: the planner, the coverage tool and preflight ask here before anything heavy is imported.
"""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.samples.blend import Source, prompts_used, sources_of
from endprompt_megatron.method.coverage import Coverage, coverage
from endprompt_megatron.method.positions import MAPS, copies, shared_positions
from endprompt_megatron.method.prompts import CUSTOM, Terminal, terminals, tokenise_prompts
from endprompt_megatron.method.recall import Recall


def recall_of(recipe: Recipe) -> Recall | None:
    """The recipe's recall prompt, its cue tokenised; None without.  Raises InputError."""
    r = recipe.context.recall
    if not r.tokens:
        return None
    [cue] = tokenise_prompts(recipe.model.hf, [CUSTOM + r.cue], "context.recall.cue")
    return Recall(tuple(cue), r.tokens, r.key, r.share)


def terminals_of(recipe: Recipe, prompt_len: int | None = None) -> list[Terminal]:
    """Every terminal segment that training samples end with, once each; [] for a method without.

    `prompt_len` stands for the length of each prompt and cue where there is no tokenizer.  Raises InputError.
    """
    c = recipe.context
    if not MAPS[c.method].has_prompt:
        return []
    count = copies(c.method, **c.knobs)
    if prompt_len is not None:
        r = c.recall
        recall = Recall((0,) * prompt_len, r.tokens, r.key, r.share) if r.tokens else None
        return terminals([(1.0, [[0] * prompt_len])], recall, count)
    recall = recall_of(recipe)
    sources = sources_of(recipe.data.train, "data.train") if recipe.data.train else [Source("")]
    if recall is not None and recall.share == 1:
        sources = []
    whole = sum(source.weight for source in sources)
    return terminals([(source.weight / whole, _prompts_of(source, recipe)) for source in sources], recall, count)


def _prompts_of(source: Source, recipe: Recipe) -> list[list[int]]:
    """The prompts that a source's samples draw from, as token ids."""
    if source.prompts is None:
        return tokenise_prompts(recipe.model.hf, list(recipe.context.prompts), "context.prompts")
    return tokenise_prompts(recipe.model.hf, list(source.prompts), f"data.train: prompts of {source.prefix}")


def positions_are_shared(recipe: Recipe) -> bool:
    """Whether all samples of the run, in training and validation, have the same position ids; asks no tokenizer."""
    recall = recipe.context.recall
    ordinary = 0 if recall.tokens and recall.share == 1 else len(prompts_used(recipe))
    return shared_positions(recipe.context.method, ordinary + bool(recall.tokens))


def coverage_of(recipe: Recipe, *, samples: int = 2000, prompt_len: int | None = None) -> Coverage:
    """Coverage of a recipe's training: its sources' prompts and recall prompts by their shares, its method's knobs.

    `prompt_len` stands for the length of each prompt where there is no tokenizer.  Raises InputError.
    """
    c, t = recipe.context, recipe.train
    found = terminals_of(recipe, prompt_len)
    try:
        return coverage(
            c.method,
            c.physical,
            c.target,
            [terminal.length for terminal in found],
            shares=[terminal.share for terminal in found],
            samples=samples,
            of=t.steps * t.global_batch_size if t.steps else None,
            seed=t.seed,
            **c.knobs,
        )
    except ValueError as error:
        raise InputError(f"context.method={c.method}: {error}") from None
