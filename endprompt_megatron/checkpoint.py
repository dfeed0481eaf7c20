"""Save, find the newest complete checkpoint, resume: whole or not there, and never a damaged one.

A save of each rank writes what the rank holds (checkpoint_state.py, optimizer_state.py) and the first rank
joins it (checkpoint_files.py).  With `checkpoint.async` the state is copied to host memory and a thread
writes it while training goes on.  A thread, not processes: the writing is done without Python's lock, and
when a rank is killed its thread goes with it, where forked writers and their managers stay behind.
Megatron-Core's own asynchronous saves differ from version to version (0.17 and later want another package);
the files here are those of its `torch_dist` format, which all versions read.
"""

import threading
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from endprompt_megatron import checkpoint_files as on_disk
from endprompt_megatron import runtime
from endprompt_megatron.checkpoint_state import read_objects, read_weights, stored_objects, stored_weights, weights_of
from endprompt_megatron.config import Recipe
from endprompt_megatron.convert.layout import (
    MANIFEST,
    complete_iterations,
    copy_hf_files,
    find_checkpoint,
    iteration_dir,
    read_manifest,
    require_space,
    write_manifest,
)
from endprompt_megatron.convert.torch_dist import Checkpoint, Stored
from endprompt_megatron.errors import InputError
from endprompt_megatron.files import disk_errors, write_json
from endprompt_megatron.optimizer_state import read_state, stored_state, updates_of
from endprompt_megatron.shape import ModelShape, read_shape

# Keys that decide what a step does.  A run that goes on with others would be neither one nor the other.
_FIXED = (
    "context.method context.target context.physical context.prompts context.prompt_loss_weight context.chunks "
    "context.rope.type context.rope.factor data.train data.packing train.global_batch_size train.seed precision.dtype"
).split()
_IDLE, _PENDING, _FAILED = range(3)  # in the order of what matters more: ranks agree on the largest
_FAREWELL_SECONDS = 30.0


@dataclass
class Progress:
    """How far a run is, and what it lost if checkpoints were damaged when it resumed."""

    step: int = 0
    consumed_samples: int = 0
    lost: list[dict] = field(default_factory=list)


class Saver:
    """Saves a run's state from all ranks.  A context manager: leaving it, no thread is left writing.

    `newest` is the step of the newest checkpoint that is complete, as far as this run has saved or resumed one.
    """

    def __init__(
        self,
        root: Path,
        recipe: Recipe,
        models: list,
        optimizer: Any,
        scheduler: Any,
        shape: ModelShape,
        export_config: dict,
        newest: int = 0,
    ) -> None:
        self.root, self.recipe, self.models, self.shape = root, recipe, models, shape
        self.optimizer, self.scheduler, self.export_config = optimizer, scheduler, export_config
        self.newest = newest
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._error: Exception | None = None
        self._step = newest
        self._buffers: list[torch.Tensor] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        """After an error the other ranks may be gone: the first one no longer waits for what they wrote."""
        if self._thread is not None:
            self._abandoned.set()
            self._thread.join(_FAREWELL_SECONDS)

    def save(self, progress: Progress) -> None:
        """Save all ranks' state; with `checkpoint.async`, return when it is copied.  All ranks must call.

        Waits for a save that is still under way.  Raises InputError if the disk is full or cannot be written.
        """
        self.wait()
        self._step = progress.step
        weights = weights_of(self.models)
        tensors = [*stored_weights(weights), *stored_state(self.optimizer, weights)]
        objects = stored_objects(self.models)
        common = {"scheduler": self.scheduler.state_dict(), "optimizer": {"updates": updates_of(self.optimizer)}}
        staging = self.root / f".{iteration_dir(self.root, progress.step).name}.partial"
        if self.rank == 0:
            self._noting_errors(on_disk.begin, self.root, progress.step)
        self._agree()
        write = partial(on_disk.write_rank, staging, self.rank)
        finish = partial(self._finish, staging, common, progress.step, progress.consumed_samples)
        if self.recipe.checkpoint.asynchronous:
            args = (write, self._staged(tensors), objects, finish)
            self._thread = threading.Thread(target=self._write_and_finish, args=args, name="checkpoint", daemon=True)
            self._thread.start()
            return
        self._noting_errors(write, tensors, objects)
        self._agree()
        if self.rank == 0:
            self._noting_errors(finish)
        self._agree()
        self.newest = progress.step

    def poll(self) -> bool:
        """Whether no save is under way (any more).  One all-reduce of an integer while one is.  All ranks must call.

        Raises InputError if the save failed for want of space or of permission, on any rank.
        """
        if self._thread is None:
            return True
        if self._agree() == _PENDING:
            return False
        self._thread.join()
        self._thread = None
        self.newest = self._step
        return True

    def wait(self) -> None:
        """Wait until the save that is under way, if any, is complete.  All ranks must call."""
        pause = 0.01
        while not self.poll():
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _staged(self, tensors: list[Stored]) -> list[Stored]:
        """Copies of the tensors in host memory that is kept for the next save: pinned where they come from a GPU.

        Memory: this rank's own state once, and on the GPU nothing beyond what a state takes to be unscaled.
        """
        staged = []
        for index, part in enumerate(tensors):
            value = part.load().detach()
            if index == len(self._buffers) or self._buffers[index].shape != value.shape:
                del self._buffers[index:]
                self._buffers.append(torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda))
            buffer = self._buffers[index]
            buffer.copy_(value, non_blocking=True)
            staged.append(replace(part, load=partial(_itself, buffer)))
        torch.cuda.synchronize()
        return staged

    def _write_and_finish(self, write: Any, tensors: list[Stored], objects: dict, finish: Any) -> None:
        """What the thread does; it never communicates.  Its end, or its error, is seen by `poll`."""
        self._noting_errors(write, tensors, objects)
        if self.rank == 0 and self._error is None:
            self._noting_errors(finish)

    def _finish(self, staging: Path, common: dict, step: int, consumed_samples: int) -> None:
        """On the first rank: join what all ranks wrote, declare it complete, and remove what is not kept."""
        c = self.recipe.checkpoint
        copy_hf_files(Path(self.recipe.model.hf), staging / "hf")
        write_json(staging / "hf" / "config.json", self.export_config)
        files = on_disk.join(staging, self.ranks, common, self._abandoned)
        write_manifest(
            staging,
            step=step,
            consumed_samples=consumed_samples,
            recipe=self.recipe.as_dict(),
            vocab_size=self.shape.vocab_size,
            dtype=self.recipe.precision.dtype,
            source=str(self.recipe.model.hf),
            files=files,
        )
        on_disk.publish(staging, self.root, step)
        on_disk.prune(self.root, c.keep, c.keep_every)

    def _noting_errors(self, function: Any, *args: Any) -> None:
        """Call; what goes wrong is kept for `_agree`, so that no rank waits for one that failed."""
        try:
            with disk_errors(self.root, "checkpoint.dir"):
                function(*args)
        except on_disk.Abandoned:
            pass
        except Exception as error:
            self._error = error

    def _agree(self) -> int:
        """_IDLE or _PENDING, the same on all ranks; raises on all of them what went wrong on any."""
        running = self._thread is not None and self._thread.is_alive()
        mine = _FAILED if self._error is not None else _PENDING if running else _IDLE
        status = torch.tensor([mine], device=runtime.device())
        dist.all_reduce(status, op=dist.ReduceOp.MAX)
        if int(status) != _FAILED:
            return int(status)
        if self.rank == 0:
            self._abandoned.set()
        is_input = isinstance(self._error, InputError)
        errors: list = [None] * self.ranks
        dist.all_gather_object(errors, (is_input, str(self._error)) if self._error is not None else None)
        if self._thread is not None:
            self._thread.join(_FAREWELL_SECONDS)
        dist.barrier()
        if self.rank == 0:
            on_disk.clear_leftovers(self.root)
        if self._error is not None:
            raise self._error
        rank, (is_input, message) = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        raise InputError(message) if is_input else RuntimeError(f"rank {rank} could not save: {message}")


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value


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
    """Write `root`/iter_NNNNNNN and return its path when it is complete.  Raises as Saver.save does."""
    with Saver(root, recipe, models, optimizer, scheduler, shape, export_config) as saver:
        saver.save(progress)
        saver.wait()
    return iteration_dir(root, progress.step)


def require_room(root: Path, recipe: Recipe, shape: ModelShape) -> None:
    """Raise InputError if the disk has no room for one checkpoint: better before the training than after it."""
    a_weight = (2 if recipe.precision.dtype == "bfloat16" else 4) + 12  # with master weight and two moments
    require_space(root, shape.parameters * a_weight, "checkpoint.dir")


def resume(root: Path, recipe: Recipe, where: str, models: list, optimizer: Any, scheduler: Any) -> Progress | None:
    """Load the newest checkpoint of this run that is whole; None if there is none yet.  All ranks must call.

    A damaged one is renamed and the one before is taken; what that loses is said, and stands in the progress.
    Raises InputError if all are damaged, and if the checkpoint was trained by a recipe that differs in a key
    that decides steps.
    """
    directory, lost = _newest_whole(root)
    if directory is None:
        return None
    manifest = read_manifest(directory)
    refuse_other_recipe(manifest["recipe"] or {}, recipe, where, directory)
    checkpoint = Checkpoint(directory)
    weights = weights_of(models)
    read_weights(weights, checkpoint)
    with runtime.together():
        read_objects(models, checkpoint)
        common = torch.load(directory / "common.pt", map_location="cpu", weights_only=True)
        read_state(optimizer, weights, checkpoint, common["optimizer"]["updates"])
    scheduler.load_state_dict(common["scheduler"])
    return Progress(manifest["step"], manifest["consumed_samples"], lost)


def _newest_whole(root: Path) -> tuple[Path | None, list[dict]]:
    """The newest checkpoint without damage, and a record of each damaged one that was set aside for it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # One look at the directory, the first rank's: another's might see another moment.
    iterations, complete, set_aside = _from_first(_held(root) if rank == 0 else None)
    lost: list[dict] = []
    for iteration in iterations:
        directory = iteration_dir(root, iteration)
        # A checkpoint gets its name when its manifest is in it: one without was tampered with.
        mine = f"{MANIFEST} is missing" if iteration not in complete else on_disk.damage(directory, rank, ranks)
        reasons: list = [None] * ranks
        dist.all_gather_object(reasons, mine)
        reason = next(filter(None, reasons), None)
        if reason is None:
            if rank == 0:
                on_disk.clear_leftovers(root)
            lost = [{"step": iteration, "lost_from": iteration + 1, **record} for record in lost]
            if lost:
                runtime.announce(_fallback(lost, directory))
            return directory, lost
        aside = _from_first(str(on_disk.set_aside(directory)) if rank == 0 else None)
        lost.append({"lost_to": iteration, "damaged": aside, "reason": reason})
    if lost or set_aside:
        said = "; ".join(f"{Path(record['damaged']).name}: {record['reason']}" for record in lost)
        raise InputError(
            f"{root}: holds no checkpoint that is whole, only damaged ones ({said or 'found before'}): remove them to "
            "start from model.init_from again, or choose another checkpoint.dir"
        )
    if rank == 0:
        on_disk.clear_leftovers(root)
    return None, []


def _held(root: Path) -> tuple[list[int], list[int], bool]:
    """Iterations under `root`, newest first; those that are complete; whether damaged ones were set aside."""
    names = {entry.name for entry in root.glob("iter_*")} if root.is_dir() else set()
    numbers = [int(name[5:]) for name in names if name[5:].isdigit()]
    found = sorted((number for number in numbers if iteration_dir(root, number).name in names), reverse=True)
    return found, complete_iterations(root), any(on_disk.DAMAGED in name for name in names)


def _fallback(lost: list[dict], directory: Path) -> str:
    newest = lost[0]
    which = "; ".join(f"{Path(record['damaged']).name}: {record['reason']}" for record in lost)
    return (
        f"{directory.parent}: damaged and set aside ({which}); falling back to {directory.name}: "
        f"steps {newest['lost_from']} to {newest['lost_to']} are lost and trained again"
    )


def _from_first(value: Any) -> Any:
    """The first rank's value, on all ranks."""
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


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
    checkpoint = Checkpoint(directory)
    read_weights(weights_of(models), checkpoint)
    read_objects(models, checkpoint)
    if optimizer is not None:
        optimizer.reload_model_params()


def refuse_other_recipe(old: dict, recipe: Recipe, where: str, directory: Path) -> None:
    """Raise InputError if a key that decides steps is another one than in `old`, the checkpoint's recipe."""
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
