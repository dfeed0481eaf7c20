"""Save, find the newest complete one, resume: Megatron-Core's distributed checkpoints, whole or not there.

A checkpoint grows under a hidden name and is renamed when every rank has written and the manifest is in
it; a job killed at any moment leaves the previous one as it was.  Weights and optimizer state are stored
by their global shapes, so a run goes on with another number of tensor, pipeline or data ranks.
"""

import contextlib
import json
import logging
import multiprocessing.dummy
import queue
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from endprompt_megatron.config import Recipe
from endprompt_megatron.convert.layout import (
    complete_iterations,
    copy_hf_files,
    find_checkpoint,
    iteration_dir,
    newest_iteration,
    read_manifest,
    require_space,
    write_latest,
    write_manifest,
)
from endprompt_megatron.errors import InputError
from endprompt_megatron.files import disk_errors, write_json
from endprompt_megatron.optimizer_state import METADATA, load_state, sharded_state
from endprompt_megatron.shape import ModelShape, read_shape

_FULL = 4 << 20  # bytes free: a writer that fails leaves a little
# Keys that decide what a step does.  A run that goes on with others would be neither one nor the other.
_FIXED = (
    "context.method context.target context.physical context.prompts context.prompt_loss_weight context.chunks "
    "context.rope.type context.rope.factor data.train data.packing train.global_batch_size train.seed precision.dtype"
).split()


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    consumed_samples: int = 0


def save(
    root: Path,
    progress: Progress,
    recipe: Recipe,
    models: list,
    optimizer: Any,
    scheduler: Any,
    shape: ModelShape,
    export_config: dict,
) -> Path:
    """Write `root`/iter_NNNNNNN from all ranks and keep the newest `checkpoint.keep`.  Returns its path.

    Raises InputError if the disk is full or cannot be written.
    """
    final = iteration_dir(root, progress.step)
    staging = root / f".{final.name}.partial"
    first = dist.get_rank() == 0
    with disk_errors(root, "checkpoint.dir"):
        if first:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        model_state = _model_state(models)
        state = {
            "model": model_state,
            "optimizer": sharded_state(optimizer, model_state, loading=False),
            "scheduler": scheduler.state_dict(),
        }
        with _quiet_checkpointing(), _written_in_process(), _full_disk_said(root, staging):
            dist_checkpointing.save(state, str(staging), content_metadata=METADATA)
        if first:
            copy_hf_files(Path(recipe.model.hf), staging / "hf")
            write_json(staging / "hf" / "config.json", export_config)
            write_manifest(
                staging,
                step=progress.step,
                consumed_samples=progress.consumed_samples,
                recipe=recipe.as_dict(),
                vocab_size=shape.vocab_size,
                dtype=recipe.precision.dtype,
                source=str(recipe.model.hf),
            )
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            write_latest(root, progress.step)
            _prune(root, recipe.checkpoint.keep)
        dist.barrier()
    return final


def require_room(root: Path, recipe: Recipe, shape: ModelShape) -> None:
    """Raise InputError if the disk has no room for one checkpoint: better before the training than after it."""
    a_weight = (2 if recipe.precision.dtype == "bfloat16" else 4) + 12  # with master weight and two moments
    require_space(root, shape.parameters * a_weight, "checkpoint.dir")


def resume(root: Path, recipe: Recipe, where: str, models: list, optimizer: Any, scheduler: Any) -> Progress | None:
    """Load the newest complete checkpoint of this run; None if there is none yet.

    Raises InputError if that checkpoint was trained by a recipe that differs in a key that decides steps.
    """
    newest = newest_iteration(root)
    dist.barrier()  # before rank 0 clears what a killed save left behind, everyone has looked
    if dist.get_rank() == 0:
        for leftover in root.glob(".iter_*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
    if newest is None:
        return None
    directory = iteration_dir(root, newest)
    manifest = read_manifest(directory)
    _refuse_other_recipe(manifest["recipe"] or {}, recipe, where, directory)
    model_state = _model_state(models)
    state = {
        "model": model_state,
        "optimizer": sharded_state(optimizer, model_state, loading=True),
    }
    loaded = _load(state, directory)
    _set_weights(models, loaded["model"])
    load_state(optimizer, loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    return Progress(manifest["step"], manifest["consumed_samples"])


def initialise(source: Path, shape: ModelShape, models: list, optimizer: Any | None, where: str) -> None:
    """Weights from a converted checkpoint (`model.init_from`); the optimizer's master weights follow.

    Raises InputError if it is not a checkpoint, not complete, or of another model.
    """
    directory = find_checkpoint(source, flag=f"{where}: model.init_from")
    held = read_shape(directory / "hf")
    for name in "num_layers hidden_size ffn_size num_heads num_kv_heads head_dim vocab_size tied_embeddings".split():
        if getattr(held, name) != getattr(shape, name):
            raise InputError(
                f"{where}: model.init_from={source} holds another model: {name}={getattr(held, name)}, "
                f"model.hf has {getattr(shape, name)}"
            )
    loaded = _load({"model": _model_state(models)}, directory)
    _set_weights(models, loaded["model"])
    if optimizer is not None:
        optimizer.reload_model_params()


def _model_state(models: list) -> ShardedStateDict:
    """Sharded state dict of this rank's chunks; the dict's own keys are local, the tensors' keys are global."""
    return {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(unwrap_model(models))}


def _set_weights(models: list, state: dict) -> None:
    for number, chunk in enumerate(unwrap_model(models)):
        chunk.load_state_dict(state[str(number)])


def _load(state: ShardedStateDict, directory: Path) -> dict:
    with _quiet_checkpointing():
        try:
            return dist_checkpointing.load(state, str(directory))
        except CheckpointException as error:  # of torch, and no Exception: it holds each rank's own error
            cause = next(iter(error.failures.values()))[0]
            reason = " ".join(str(cause).split())[:300] or type(cause).__name__
            raise InputError(f"{directory}: the checkpoint cannot be read ({reason})") from error
        except (OSError, EOFError, RuntimeError, CheckpointingException, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"{directory}: the checkpoint cannot be read ({reason})") from error


@contextlib.contextmanager
def _quiet_checkpointing() -> Iterator[None]:
    """Silence what Megatron-Core logs about formats that it chose itself; errors raise, and are said once."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(previous)


@contextlib.contextmanager
def _full_disk_said(root: Path, staging: Path) -> Iterator[None]:
    """Turn a save that failed for want of space, which Megatron-Core reports in many ways, into InputError."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if shutil.disk_usage(root).free > _FULL:
            raise
        shutil.rmtree(staging, ignore_errors=True)
        raise InputError(
            f"checkpoint.dir {root}: no space left on the disk; free some, or choose another place, and run again"
        ) from error


@contextlib.contextmanager
def _written_in_process() -> Iterator[None]:
    """Let the writer use threads and queues of this process.

    Megatron-Core forks a process a file and starts another that manages their results, which asynchronous
    saves need and synchronous ones do not.  They cost seconds and memory, and when a rank is killed while
    it saves they stay behind: the manager for ever, a forked writer waiting for a queue no one fills.
    """
    previous = filesystem_async.mp, filesystem_async._results_queue
    filesystem_async.mp = SimpleNamespace(get_context=lambda _method: multiprocessing.dummy)
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async.mp, filesystem_async._results_queue = previous


def _prune(root: Path, keep: int) -> None:
    for iteration in complete_iterations(root)[:-keep] if keep else []:
        shutil.rmtree(iteration_dir(root, iteration), ignore_errors=True)


def _refuse_other_recipe(old: dict, recipe: Recipe, where: str, directory: Path) -> None:
    new = recipe.as_dict()
    for key in _FIXED:
        before, now = _get(old, key), _get(new, key)
        if before != now:
            raise InputError(
                f"{where}: {key}={now} but {directory} was trained with {before}: "
                "go on with that value, or choose another checkpoint.dir"
            )


def _get(tree: dict, dotted: str) -> Any:
    node: Any = tree
    for name in dotted.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node
