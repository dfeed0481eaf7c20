"""Checkpoints of LoRA that hold what was trained alone (longlora.save_frozen=false), read over their base.

The base is what the run started from, model.init_from.  The manifest says where it lay and what it held, so that
adapters are never put over another model's weights.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import torch

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import digest_of_some
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.convert.direct import HfSource
from endprompt_megatron.convert.hf_weights import weight_files
from endprompt_megatron.distributed.runtime import is_rank_zero, raise_on_all_ranks


def base_to_record(recipe: Recipe) -> dict | None:
    """What a checkpoint's manifest says of its base, on the first rank; None where checkpoints hold all weights.

    All ranks must call.  Raises InputError.
    """
    if recipe.longlora.save_frozen:
        return None
    with raise_on_all_ranks():
        if not is_rank_zero():
            return None
        directory = _weights_in(Path(recipe.model.init_from))
        return {"path": str(directory.resolve()), "digest": _digest(directory)}


def base_weights(record: dict, where: str, also: str | Path | None = None) -> "HfSource | Checkpoint":
    """The weights that `record` tells of: where they lay, or in `also`.  `where` opens messages.

    Raises InputError if neither holds what it held.
    """
    tried = []
    for place in dict.fromkeys(str(path) for path in (record["path"], also) if path is not None):
        if not Path(place).is_dir():
            tried.append(f"{place} is not there")
            continue
        directory = _weights_in(Path(place))
        if _digest(directory) == record["digest"]:
            return HfSource(directory) if layout.is_hugging_face(directory) else Checkpoint(directory)
        tried.append(f"{place} holds other weights")
    raise InputError(
        f"{where}: holds what LoRA trained alone, and its base cannot be found ({'; '.join(tried)}): put it back, or "
        "name where it is by tools/convert_megatron_to_hf.py --base"
    )


def checkpoint_at(directory: Path, base: Path | None = None, *, once: bool = False) -> Checkpoint:
    """A checkpoint with all of its model's weights, if need be over its base, which may have moved to `base`.

    `once`: no shard of it will be read twice.
    """
    manifest = layout.read_manifest(directory)
    if "base" not in manifest:
        return Checkpoint(directory, once=once)
    return OverBase(directory, manifest, base, once=once)


class OverBase(Checkpoint):
    """What a checkpoint lacks is its base's, rounded to the dtype of the training, in which the adapters met it.

    The base is looked for when something of it is asked for.
    """

    def __init__(self, directory: Path, manifest: dict, moved: Path | None, *, once: bool = False) -> None:
        super().__init__(directory, once=once)
        self.record, self.moved, self.trained_in = manifest["base"], moved, getattr(torch, manifest["dtype"])

    @cached_property
    def base(self) -> "HfSource | Checkpoint":
        """Raises InputError if it cannot be found."""
        return base_weights(self.record, str(self.directory), self.moved)

    def shape(self, key: str) -> tuple[int, ...] | None:
        return super().shape(key) if key in self.tensors or ".adapter." in key else self.base.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return super().dtype(key) if key in self.tensors else self.trained_in

    def read(
        self,
        key: str,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        zero_outside: bool = False,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if key in self.tensors:
            return super().read(key, offset, shape, dtype, zero_outside=zero_outside, into=into)
        rounded = into if dtype == self.trained_in else None
        value = self.base.read(key, offset, shape, self.trained_in, zero_outside=zero_outside, into=rounded)
        return value.to(dtype) if into is None or value is into else into.copy_(value)

    def row_cuts(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], axis: int) -> list[int]:
        source = super() if key in self.tensors else self.base
        return source.row_cuts(key, offset, shape, axis)


def _weights_in(source: Path) -> Path:
    """The directory itself, or the iter_ directory in it that training would start from."""
    return source if layout.is_hugging_face(source) else layout.find_checkpoint(source, flag="model.init_from")


def _digest(directory: Path) -> str:
    """SHA-256 of what the weights are told by: a checkpoint's checksums, or some blocks of each Hugging Face file."""
    if layout.is_hugging_face(directory):
        files = {name: directory / name for name in weight_files(directory)}
        told = [(name, path.stat().st_size, digest_of_some(path, blocks=8)) for name, path in files.items()]
    else:
        told = sorted(layout.read_manifest(directory)["files"].items())
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
