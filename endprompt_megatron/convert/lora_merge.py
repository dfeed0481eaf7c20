"""LoRA's adapters in a checkpoint, and what they add to Hugging Face's matrices: W + alpha / rank * B A, in float32.

The adapters' tensors are named as lora.py names their matrices, all layers of one stacked in axis 0, and stand
in Hugging Face's order of heads: queries, keys and values each have a B of their own.
"""

from pathlib import Path

import torch

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert.mapping import mapped_tensors
from endprompt_megatron.model.families import FC1, FC2, LAYERS, PROJ, QKV
from endprompt_megatron.model.longlora import ADAPTER
from endprompt_megatron.model.shape import ModelShape

_FC1, _FC2 = (LAYERS + f"mlp.linear_{name}" + ADAPTER for name in ("fc1", "fc2"))
_QKV = LAYERS + "self_attention.linear_qkv" + ADAPTER
_PROJ = LAYERS + "self_attention.linear_proj" + ADAPTER
# Of each of Hugging Face's matrices that a weight of Megatron's is made of: A, which of those in it, B.
_ATTENTION = {
    QKV: ((_QKV + "down", 0, _QKV + "up_q"), (_QKV + "down", 1, _QKV + "up_k"), (_QKV + "down", 2, _QKV + "up_v")),
    PROJ: ((_PROJ + "down", 0, _PROJ + "up"),),
}
_MLP = {
    FC1: ((_FC1 + "down", 0, _FC1 + "up_gate"), (_FC1 + "down", 1, _FC1 + "up_up")),
    FC2: ((_FC2 + "down", 0, _FC2 + "up"),),
}


def adapted(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds adapters."""
    return checkpoint.shape(_QKV + "down") is not None


def adapters_of(shape: ModelShape, mlp: bool) -> dict[str, tuple[int, str, int, str]]:
    """Layer, A, which of those in it, and B, by the name of Hugging Face's matrix that they change; `mlp`: its too."""
    adapters = _ATTENTION | (_MLP if mlp else {})
    matrices: dict[tuple[int, str], list[str]] = {}  # in the order that they have in a weight
    for mapped in mapped_tensors(shape):
        if mapped.key in adapters:
            matrices.setdefault((mapped.offset[0], mapped.key), []).extend(name for name, _ in mapped.hf)
    return {
        name: (layer, *adapter)
        for (layer, key), names in matrices.items()
        for name, adapter in zip(names, adapters[key], strict=True)
    }


class Merge:
    """Adds adapters to Hugging Face's matrices, some rows at a time."""

    def __init__(self, checkpoint: Checkpoint, longlora: dict, shape: ModelShape):
        """`longlora`: the section of the recipe in the manifest.  Raises InputError if the adapters are others."""
        self.checkpoint, self.rank = checkpoint, longlora["rank"]
        self.scale = longlora["alpha"] / self.rank
        self.adapters = adapters_of(shape, longlora.get("mlp", False))
        for down, number, up in sorted({adapter[1:] for adapter in self.adapters.values()}):
            stored = checkpoint.shape(down), checkpoint.shape(up)
            if None in stored or stored[0][1] <= number * self.rank or stored[1][2] != self.rank:
                raise InputError(
                    f"{checkpoint.directory}: its recipe says longlora.rank={self.rank}, but {down} and {up} are not "
                    "those of such adapters; the checkpoint is damaged"
                )

    def changes(self, name: str) -> bool:
        """Whether Hugging Face's tensor `name` has an adapter."""
        return name in self.adapters

    def add_to(self, rows: torch.Tensor, name: str, first: int = 0) -> torch.Tensor:
        """Rows first.. of the tensor `name` [n, inputs] float32, in place, with what its adapter adds to them."""
        layer, down, number, up = self.adapters[name]
        count = rows.shape[0]
        a = self._read(down, (layer, number * self.rank, 0), (1, self.rank, rows.shape[1]))
        b = self._read(up, (layer, first, 0), (1, count, self.rank))
        return rows.addmm_(b, a, alpha=self.scale)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, inputs] and B [outputs, rank] of the tensor `name`, float32, as they were trained."""
        layer, down, number, up = self.adapters[name]
        inputs, outputs = self.checkpoint.shape(down)[2], self.checkpoint.shape(up)[1]
        a = self._read(down, (layer, number * self.rank, 0), (1, self.rank, inputs))
        return a, self._read(up, (layer, 0, 0), (1, outputs, self.rank))

    def _read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        return self.checkpoint.read(key, offset, shape, torch.float32)[0]


def merge_of(checkpoint: Checkpoint, shape: ModelShape) -> Merge | None:
    """What merges the adapters of a checkpoint of a model of this shape; None where it has none.

    Raises InputError if its recipe and its tensors disagree.
    """
    longlora = longlora_of(checkpoint.directory)
    if longlora.get("rank"):
        return Merge(Checkpoint(checkpoint.directory), longlora, shape)
    if adapted(checkpoint):
        raise InputError(
            f"{checkpoint.directory}: holds LoRA's adapters, but the recipe in {layout.MANIFEST} has no longlora.rank: "
            "what they are scaled by is not known"
        )
    return None


def longlora_of(directory: Path) -> dict:
    """The recipe's section `longlora` in the manifest of an iter_ directory; empty where there is none."""
    recipe = layout.read_manifest(directory)["recipe"] or {}
    return recipe.get("longlora") or {}
