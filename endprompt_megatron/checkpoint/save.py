"""Save a run: every rank writes what it holds, beside the training if wished, and the first rank joins it.

With `checkpoint.async` the state is copied to host memory and a thread writes it while training continues.  A
thread, not processes: the writing is done without Python's lock, and when a rank is killed its thread goes with
it, where forked writers and their managers stay behind.  Megatron-Core's own asynchronous saves differ from
version to version (0.17 and later want another package); the files here are those of its `torch_dist` format,
which all versions read.
"""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from endprompt_megatron.checkpoint import integrity
from endprompt_megatron.checkpoint.layout import (
    copy_hf_files,
    iteration_dir,
    require_space,
    write_manifest,
)
from endprompt_megatron.checkpoint.optimizer_state import stored_state, updates_of
from endprompt_megatron.checkpoint.run_state import Progress, RunState
from endprompt_megatron.checkpoint.shard_files import Shard
from endprompt_megatron.checkpoint.weights import stored_objects, stored_weights, weights_of
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors, write_json
from endprompt_megatron.config.recipe import LongLora, Recipe
from endprompt_megatron.distributed import runtime
from endprompt_megatron.model.longlora import checkpoint_bytes
from endprompt_megatron.model.shape import ModelShape

_IDLE, _PENDING, _FAILED = range(3)  # in the order of what matters more: ranks agree on the largest
_FAREWELL_SECONDS = 30.0


class Saver:
    """Saves a run's state from all ranks.  A context manager: leaving it, no thread is left writing.

    `newest` is the step of the newest checkpoint that is complete, as far as this run has saved or resumed one.
    """

    def __init__(
        self,
        root: Path,
        recipe: Recipe,
        export_files: dict[str, dict],
        state: RunState,
        newest: int = 0,
        spared: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """`export_files`: config.json, and others of model.hf's small files, as the model will be exported with.

        `spared`: iterations that somebody needs, whatever checkpoint.keep says.
        """
        self.spared = spared
        self.root, self.recipe, self.export_files = root, recipe, export_files
        self.state, self.newest = state, newest
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
        weights = weights_of(self.state.models)
        if not self.recipe.longlora.save_frozen:
            weights = [weight for weight in weights if weight.parameter.requires_grad]
        shards = [*stored_weights(weights), *stored_state(self.state.optimizer, weights)]
        objects = stored_objects(self.state.models)
        updates = updates_of(self.state.optimizer)
        common = {"scheduler": self.state.scheduler.state_dict(), "optimizer": {"updates": updates}}
        staging = self.root / f".{iteration_dir(self.root, progress.step).name}.partial"
        if self.rank == 0:
            self._noting_errors(integrity.begin, self.root, progress.step)
        self._agree()
        write = partial(integrity.write_rank, staging, self.rank)
        finish = partial(self._finish, staging, common, progress.step, progress.consumed_samples)
        if self.recipe.checkpoint.asynchronous:
            args = (write, self._staged(shards), objects, finish)
            self._thread = threading.Thread(target=self._write_and_finish, args=args, name="checkpoint", daemon=True)
            self._thread.start()
            return
        self._noting_errors(write, shards, objects)
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

    def _staged(self, shards: list[Shard]) -> list[Shard]:
        """Copies of the tensors in host memory that is kept for the next save: pinned where they come from a GPU.

        Memory: this rank's own state once, and on the GPU nothing beyond what a state takes to be unscaled.
        """
        staged = []
        for index, shard in enumerate(shards):
            value = shard.load().detach()
            if index == len(self._buffers) or self._buffers[index].shape != value.shape:
                del self._buffers[index:]
                self._buffers.append(torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda))
            buffer = self._buffers[index]
            buffer.copy_(value, non_blocking=True)
            staged.append(replace(shard, load=partial(_itself, buffer)))
        torch.cuda.synchronize()
        return staged

    def _write_and_finish(self, write: Any, shards: list[Shard], objects: dict, finish: Any) -> None:
        """What the thread does; it never communicates.  Its end, or its error, is seen by `poll`."""
        self._noting_errors(write, shards, objects)
        if self.rank == 0 and self._error is None:
            self._noting_errors(finish)

    def _finish(self, staging: Path, common: dict, step: int, consumed_samples: int) -> None:
        """On the first rank: join what all ranks wrote, declare it complete, and remove what is not kept."""
        c = self.recipe.checkpoint
        copy_hf_files(Path(self.recipe.model.hf), staging / "hf")
        for name, content in self.export_files.items():
            write_json(staging / "hf" / name, content)
        files = integrity.join(staging, self.ranks, common, self._abandoned)
        write_manifest(
            staging,
            step=step,
            consumed_samples=consumed_samples,
            recipe=self.recipe.as_dict(),
            vocab_size=self.export_files["config.json"]["vocab_size"],
            dtype=self.recipe.precision.dtype,
            source=str(self.recipe.model.hf),
            files=files,
            data=self.state.data,
            base=self.state.base,
        )
        integrity.publish(staging, self.root, step)
        integrity.prune(self.root, c.keep, c.keep_every, self.spared())

    def _noting_errors(self, function: Any, *args: Any) -> None:
        """Call; what goes wrong is kept for `_agree`, so that no rank waits for one that failed."""
        try:
            with disk_errors(self.root, "checkpoint.dir"):
                function(*args)
        except integrity.Abandoned:
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
            integrity.clear_leftovers(self.root)
        if self._error is not None:
            raise self._error
        rank, (is_input, message) = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        raise InputError(message) if is_input else RuntimeError(f"rank {rank} could not save: {message}")


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value


def require_disk_space(root: Path, shape: ModelShape, longlora: LongLora, dtype: str) -> None:
    """Raise InputError if the disk cannot take one checkpoint: better before the training than after it.

    `dtype`: the recipe's precision.dtype.
    """
    weight = 2 if dtype == "bfloat16" else 4
    require_space(root, checkpoint_bytes(shape, longlora, weight), "checkpoint.dir")
