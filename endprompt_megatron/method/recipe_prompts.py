"""What the samples of a recipe can end with: prompts of the recipe and of its sources, copies of them, recall prompts.

No torch: the planner's neighbours, coverage and preflight ask here before anything heavy is imported.
"""

from dataclasses import dataclass

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.samples.blend import Source, prompts_used, sources_of
from endprompt_megatron.method.positions import WITH_PROMPT, copies
from endprompt_megatron.method.prompts import CUSTOM, tokenise_prompts
from endprompt_megatron.method.recall import Recall


@dataclass(frozen=True)
class Terminal:
    """A terminal segment: ids of one copy (0 where a span goes), tokens of all copies, its share of the samples."""

    prompt: tuple[int, ...]
    length: int
    share: float


def recall_of(recipe: Recipe) -> Recall | None:
    """The recipe's recall prompt, its cue tokenised; None without.  Raises InputError."""
    r = recipe.context.recall
    if not r.tokens:
        return None
    [cue] = tokenise_prompts(recipe.model.hf, [CUSTOM + r.cue], "context.recall.cue")
    return Recall(tuple(cue), r.tokens, r.key, r.share)


def terminals(recipe: Recipe, prompt_len: int | None = None) -> list[Terminal]:
    """Every terminal segment that training samples end with, once each; [] for a method without.

    `prompt_len` stands for the length of each prompt and cue where there is no tokenizer.  Raises InputError.
    """
    c = recipe.context
    if c.method not in WITH_PROMPT:
        return []
    sources = sources_of(recipe.data.train, "data.train") if recipe.data.train else [Source("")]
    share = c.recall.share if c.recall.tokens else 0.0
    shares: dict[tuple[int, ...], float] = {}
    if prompt_len is not None:
        shares = {(0,) * prompt_len: 1 - share} if share < 1 else {}
        if share:
            shares[(0,) * (prompt_len + c.recall.tokens)] = share
    else:
        whole = sum(source.weight for source in sources)
        for source in sources if share < 1 else []:
            names = list(c.prompts if source.prompts is None else source.prompts)
            key = "context.prompts" if source.prompts is None else f"data.train: prompts of {source.prefix}"
            for prompt in map(tuple, tokenise_prompts(recipe.model.hf, names, key)):
                shares[prompt] = shares.get(prompt, 0.0) + (1 - share) * source.weight / whole / len(names)
        recall = recall_of(recipe)
        if recall is not None:
            shares[tuple(recall.prompt)] = share
    count = copies(c.method, c.anchors)
    return [Terminal(prompt, count * len(prompt), part) for prompt, part in shares.items()]


def kinds(recipe: Recipe) -> int:
    """How many different terminal segments samples end with, in training or validation; no tokenizer is asked."""
    recall = bool(recipe.context.recall.tokens)
    return recall + (0 if recall and recipe.context.recall.share == 1 else len(prompts_used(recipe)))
