"""What `longlora` can be combined with: shifted sparse attention, and LoRA."""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import LongLora, Recipe


def check_longlora(recipe: Recipe, where: str) -> None:
    """Raise InputError for what shifted attention or LoRA cannot be combined with; the line names what they can."""
    longlora = recipe.longlora
    if longlora.shifted:
        _check_shifted(recipe, where)
    elif longlora.groups != LongLora().groups:
        raise InputError(f"{where}: longlora.groups={longlora.groups} needs longlora.shifted=true: leave it out")
    if longlora.rank:
        _check_rank(recipe, where)
        return
    if longlora.init_from is not None:
        raise InputError(f"{where}: longlora.init_from={longlora.init_from} needs longlora.rank: that of the adapter")
    if longlora.mlp:
        raise InputError(f"{where}: longlora.mlp=true with longlora.rank=0, which trains every parameter: set a rank")
    for key in ("train_embeddings", "train_norms", "save_frozen"):
        if not getattr(longlora, key):
            raise InputError(
                f"{where}: longlora.{key}=false with longlora.rank=0, which trains every parameter: set a rank, such "
                "as 8"
            )


def _check_shifted(recipe: Recipe, where: str) -> None:
    groups, length = recipe.longlora.groups, recipe.context.physical
    asked = f"{where}: longlora.shifted=true"
    if groups < 2:
        raise InputError(f"{where}: longlora.groups={groups} should be at least 2; 4 as published")
    if length % (2 * groups):
        raise InputError(
            f"{asked} shifts by half a group: context.physical={length} should be a multiple of 2 x "
            f"longlora.groups={2 * groups}"
        )
    if recipe.parallel.context > 1:
        raise InputError(
            f"{asked} with parallel.context={recipe.parallel.context}: a group would lie on several ranks; use "
            "parallel.context=1 and more parallel.tensor or recomputation"
        )
    if recipe.data.packing != "stream":
        raise InputError(f"{asked} with data.packing={recipe.data.packing}: groups would cut documents; use stream")
    if recipe.precision.fp8_attention:
        raise InputError(f"{asked} with precision.fp8_attention=true: its attention is in BF16; use false")


def _check_rank(recipe: Recipe, where: str) -> None:
    asked = f"{where}: longlora.rank={recipe.longlora.rank}"
    if not recipe.longlora.save_frozen and recipe.model.init_from is None:
        raise InputError(
            f"{where}: longlora.save_frozen=false without model.init_from: name the weights that are frozen"
        )
    if recipe.precision.fp8 is not None:
        raise InputError(
            f"{asked} with precision.fp8={recipe.precision.fp8}: adapters and the matrices under them are in BF16; "
            "use null"
        )
    if recipe.parallel.overlap_tensor:
        raise InputError(
            f"{asked} with parallel.overlap_tensor=true: it hides traffic behind the weight gradients of matrices "
            "that LoRA leaves frozen; use false"
        )
