"""What each context.method requires of the other keys of context.*: lengths, prompts, chunks, copies, recall."""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recall, Recipe
from endprompt_megatron.method.positions import MAPS, copies


def check_methods(recipe: Recipe, where: str) -> None:
    """Raise InputError for keys that the method cannot work with; the line names what would be legal."""
    c = recipe.context
    position_map = MAPS[c.method]
    if position_map.whole_window and c.physical != c.target:
        raise InputError(
            f"{where}: context.method={c.method} trains at full length: context.physical={c.physical} should be "
            f"{c.target}"
        )
    if position_map.has_prompt and not c.prompts:
        raise InputError(f"{where}: context.prompts is empty; {c.method} needs at least one, such as [EP_1]")
    if c.prompt_loss_weight < 0 or (position_map.has_prompt and c.prompt_loss_weight == 0):
        raise InputError(f"{where}: context.prompt_loss_weight={c.prompt_loss_weight} should be above 0")
    if "chunks" in position_map.knobs and c.chunks < 2:
        raise InputError(f"{where}: context.chunks={c.chunks} should be at least 2 for {c.method}")
    if "curriculum_samples" in position_map.knobs and c.curriculum_samples is None:
        raise InputError(
            f"{where}: context.curriculum_samples is missing: give the number of samples after which the prompt stands "
            f"at the end of the window.  The run has {recipe.train.steps * recipe.train.global_batch_size}"
        )
    _check_recall(recipe, where)
    _check_retain(recipe, where)


def _check_retain(recipe: Recipe, where: str) -> None:
    c, retain = recipe.context, recipe.context.retain
    if not retain.weight:
        if retain.every != 1:
            raise InputError(
                f"{where}: context.retain.weight is 0, so context.retain.every={retain.every} has no effect: give a "
                "weight, such as 1.0, or leave it out"
            )
        return
    said = f"{where}: context.retain.weight={retain.weight}"
    if c.physical > c.original:
        raise InputError(
            f"{said} with context.physical={c.physical}: the base knows inputs of {c.original} tokens "
            "(context.original): train on samples of at most that, or use 0"
        )
    if recipe.parallel.pipeline > 1:
        raise InputError(
            f"{said} with parallel.pipeline={recipe.parallel.pipeline}: every rank runs the whole base beside the "
            "model: use parallel.pipeline=1 (parallel.tensor shards both), or 0"
        )
    if recipe.data.packing == "documents":
        raise InputError(f"{said} with data.packing=documents: use data.packing=stream, or 0")
    if recipe.model.init_from is None:
        raise InputError(f"{said} requires the base's weights, also in a run that goes on: give model.init_from")


def _check_recall(recipe: Recipe, where: str) -> None:
    c, r = recipe.context, recipe.context.recall
    if not r.tokens:
        if r != Recall():
            raise InputError(
                f"{where}: context.recall.tokens is 0, so its other keys have no effect: give the length of the span, "
                "such as 53, or leave out context.recall"
            )
        return
    if not MAPS[c.method].has_prompt:
        raise InputError(
            f"{where}: context.recall.tokens={r.tokens} with context.method={c.method}, which has no terminal prompt: "
            "use end_prompt or end_prompt_near (the control)"
        )
    max_tokens = (c.physical - 1) // (copies(c.method, **c.knobs) + 1)
    if r.tokens > max_tokens:
        raise InputError(
            f"{where}: context.recall.tokens={r.tokens} leaves no context to recall it from in context.physical="
            f"{c.physical}: use at most {max_tokens}, less for the cue"
        )
    if not 0 < r.share <= 1:
        raise InputError(f"{where}: context.recall.share={r.share} should be above 0 and at most 1")
    if r.key >= r.tokens:
        raise InputError(
            f"{where}: context.recall.key={r.key} leaves nothing to recall of context.recall.tokens={r.tokens}: "
            "give fewer, such as 8"
        )
