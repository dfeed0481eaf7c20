"""Find the newest complete checkpoint and continue from it; or begin from given weights."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from endprompt_megatron.checkpoint import integrity
from endprompt_megatron.checkpoint.layout import (
    MANIFEST,
    complete_iterations,
    iteration_dir,
    read_manifest,
)
from endprompt_megatron.checkpoint.optimizer_state import read_state
from endprompt_megatron.checkpoint.run_state import Progress, RunState
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.checkpoint.weights import WeightSource, read_objects, read_weights, weights_of
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.keys import get, keys_of
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed import runtime
from endprompt_megatron.model.longlora import ADAPTER


def resume(
    root: Path, recipe: Recipe, where: str, state: RunState, base: Callable[[dict, str], WeightSource] | None = None
) -> Progress | None:
    """Load the newest checkpoint of this run that is complete; None if there is none yet.  All ranks must call.

    `base` finds the weights of which a checkpoint holds a record alone (convert/over_base.py).
    A damaged one is renamed and the one before it is taken; what that loses is printed, and is in the progress.
    Raises InputError if all are damaged, and if the checkpoint was trained by a recipe that differs in a key
    that decides steps.
    """
    directory, lost = _newest_undamaged(root)
    if directory is None:
        return None
    manifest = read_manifest(directory)
    with runtime.raise_on_all_ranks():
        refuse_other_recipe(manifest["recipe"] or {}, recipe, where, directory)
        if state.data is not None:
            refuse_other_data(manifest, state.data, recipe, where, directory)
    checkpoint = Checkpoint(directory)
    weights = weights_of(state.models)
    held = weights
    if manifest.get("base") is not None:
        with runtime.raise_on_all_ranks():
            source = base(manifest["base"], str(directory))
        read_weights([weight for weight in weights if not weight.parameter.requires_grad], source)
        held = [weight for weight in weights if weight.parameter.requires_grad]
    read_weights(held, checkpoint)
    with runtime.raise_on_all_ranks():
        read_objects(state.models, checkpoint)
        common = torch.load(directory / "common.pt", map_location="cpu", weights_only=True)
        read_state(state.optimizer, weights, checkpoint, common["optimizer"]["updates"])
    state.scheduler.load_state_dict(common["scheduler"])
    return Progress(manifest["step"], manifest["consumed_samples"], lost)


def _newest_undamaged(root: Path) -> tuple[Path | None, list[dict]]:
    """The newest checkpoint without damage, and a record of each damaged one that was set aside for it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # One look at the directory, the first rank's: another's might see another moment.
    iterations, complete, set_aside = _from_rank_zero(_held(root) if rank == 0 else None)
    lost: list[dict] = []
    for iteration in iterations:
        directory = iteration_dir(root, iteration)
        # A checkpoint gets its name when its manifest is in it: one without was tampered with.
        missing = None if iteration in complete else f"{MANIFEST} is missing"
        mine = missing or next(integrity.damage(directory, rank, ranks), None)
        reasons: list = [None] * ranks
        dist.all_gather_object(reasons, mine)
        reason = next(filter(None, reasons), None)
        if reason is None:
            if rank == 0:
                integrity.clear_leftovers(root)
            lost = [{"step": iteration, "lost_from": iteration + 1, **record} for record in lost]
            if lost:
                runtime.print_rank_zero(_fallback(lost, directory))
            return directory, lost
        aside = _from_rank_zero(str(integrity.set_aside(directory)) if rank == 0 else None)
        lost.append({"lost_to": iteration, "damaged": aside, "reason": reason})
    if lost or set_aside:
        said = "; ".join(f"{Path(record['damaged']).name}: {record['reason']}" for record in lost)
        raise InputError(
            f"{root}: holds no complete checkpoint, only damaged ones ({said or 'found before'}): remove them to "
            "start from model.init_from again, or choose another checkpoint.dir"
        )
    if rank == 0:
        integrity.clear_leftovers(root)
    return None, []


def _held(root: Path) -> tuple[list[int], list[int], bool]:
    """Iterations under `root`, newest first; those that are complete; whether damaged ones were set aside."""
    names = {entry.name for entry in root.glob("iter_*")} if root.is_dir() else set()
    numbers = [int(name[5:]) for name in names if name[5:].isdigit()]
    found = sorted((number for number in numbers if iteration_dir(root, number).name in names), reverse=True)
    return found, complete_iterations(root), any(integrity.DAMAGED in name for name in names)


def _fallback(lost: list[dict], directory: Path) -> str:
    newest = lost[0]
    which = "; ".join(f"{Path(record['damaged']).name}: {record['reason']}" for record in lost)
    return (
        f"{directory.parent}: damaged and set aside ({which}); falling back to {directory.name}: "
        f"steps {newest['lost_from']} to {newest['lost_to']} are lost and trained again"
    )


def _from_rank_zero(value: Any) -> Any:
    """Rank zero's value, on all ranks."""
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def initialise(
    source: WeightSource, models: list, optimizer: Any | None, over: WeightSource | None = None, keys: Any = ()
) -> None:
    """Weights to begin with; the master weights follow.  LoRA's adapters start as they were built.

    `over` has weights `keys` to put over them: adapters that go on, and what was trained beside them.
    """
    weights = weights_of(models)
    read_weights([weight for weight in weights if ADAPTER not in weight.key], source)
    if over is not None:
        read_weights([weight for weight in weights if weight.key in keys], over)
    read_objects(models, source)
    if optimizer is not None:
        optimizer.reload_model_params()


def refuse_other_recipe(old: dict, recipe: Recipe, where: str, directory: Path) -> None:
    """Raise InputError if a key that decides steps is another one than in `old`, the checkpoint's recipe."""
    for declared in keys_of(type(recipe)):
        if declared.key.fixed is not True:
            continue
        key = declared.dotted
        # A checkpoint older than the key was trained with the key's default.
        before, now = get(old, key, declared.default), get(recipe, key)
        if before != now:
            raise InputError(
                f"{where}: {key}={now} but {directory} was trained with {before}: "
                "keep that value, or choose another checkpoint.dir"
            )


def refuse_other_data(manifest: dict, data: list[dict], recipe: Recipe, where: str, directory: Path) -> None:
    """Raise InputError unless `data` (data/samples/identity.py) is what the checkpoint in `directory` was trained on.

    A path may differ where the content does not.
    """
    trained_on = manifest.get("data")
    if trained_on is None:  # a checkpoint older than these records
        before = get(manifest["recipe"] or {}, "data.train")
        if before != recipe.data.train:
            raise InputError(
                f"{where}: data.train={recipe.data.train} but {directory} was trained with {before}: "
                "keep that value, or choose another checkpoint.dir"
            )
        return
    for old, now in itertools.zip_longest(trained_on, data, fillvalue={}):
        differs = next((name for name in ("weight", "prompts") if old.get(name) != now.get(name)), None)
        if not old or not now or differs:
            raise InputError(
                f"{where}: data.train={recipe.data.train} but {directory} was trained with {_sources(trained_on)}: "
                "keep its sources, their weights and prompts, or choose another checkpoint.dir"
            )
        known = [name for name in ("index", "tokens", "crc32") if old[name] is not None and now[name] is not None]
        if any(old[name] != now[name] for name in known):
            raise InputError(
                f"{where}: data.train: {now['prefix']} is not the data that {directory} was trained on "
                f"({old['prefix']} as it was then), its documents differ: prepare it again from the same inputs, or "
                "choose another checkpoint.dir"
            )


def _sources(data: list[dict]) -> str:
    """data.train of a record, as a recipe has it."""
    plain = all(source["weight"] == 1.0 and source["prompts"] is None for source in data)
    if plain:
        return str([source["prefix"] for source in data] if len(data) > 1 else data[0]["prefix"])
    return str({source["prefix"]: {key: source[key] for key in ("weight", "prompts")} for source in data})
