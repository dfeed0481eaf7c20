"""Start LoRA from an adapter in PEFT's format: a WeightSource of adapters, and of what was trained beside them.

The base's weights are read first, as ever; what this source holds is read over them.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, refuse_pointer
from endprompt_megatron.config.recipe import LongLora
from endprompt_megatron.convert.lora_merge import adapters_of
from endprompt_megatron.convert.mapping import PADDED, mapped_tensors
from endprompt_megatron.model.shape import ModelShape

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # before PEFT's names of what lies in the base
# What PEFT computes otherwise than alpha / rank B A with these set.
_VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out")


class PeftSource:
    """The tensors of an adapter by Megatron's names; `keys` says which it holds."""

    def __init__(self, directory: Path, longlora: LongLora, shape: ModelShape, where: str) -> None:
        """Raises InputError, naming `where`, for an adapter of another kind, rank, scale or model."""
        self.where = f"{where}={directory}"
        self.targets = "q, k, v, o, gate, up, down" if longlora.mlp else "q, k, v, o"
        self._check(read_json(directory / CONFIG, "PEFT's description of an adapter"), longlora)
        tensors = self._load(directory / WEIGHTS)
        self.matrices: dict[tuple[str, int], list[torch.Tensor]] = {}  # by key and layer, those that are stacked
        mapped = list(mapped_tensors(shape))
        sizes = {name: size for tensor in mapped for name, size in tensor.hf}
        for name, (layer, down, _, up) in adapters_of(shape, longlora.mlp).items():
            module, (outputs, inputs) = name.removesuffix(".weight"), sizes[name]
            a = self._take(tensors, f"{module}.lora_A.weight", (longlora.rank, inputs))
            b = self._take(tensors, f"{module}.lora_B.weight", (outputs, longlora.rank))
            self.matrices.setdefault((down, layer), []).append(a)
            self.matrices[up, layer] = [b]
        beside = [tensor for tensor in mapped if tensor.key in PADDED or "norm" in tensor.key]
        held = {tensor.key for tensor in beside if tensor.hf[0][0] in tensors}
        for tensor in beside:
            if tensor.key in held:  # and then in every layer
                layer = tensor.offset[0] if tensor.per_layer else 0
                self.matrices[tensor.key, layer] = [self._take(tensors, *tensor.hf[0])]
        if tensors:
            raise InputError(
                f"{self.where}: {min(tensors)} is nothing that this longlora trains ({self.targets}, embeddings, norms)"
            )
        self.keys = {key for key, _ in self.matrices}

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
        """See WeightSource."""
        target = torch.empty(shape, dtype=dtype) if into is None else into
        if zero_outside:
            target.zero_()
        per_layer = key.startswith("decoder.layers.")
        for index in range(shape[0] if per_layer else 1):
            whole = torch.cat(self.matrices[key, offset[0] + index if per_layer else 0])
            shard, at = (target[index], offset[1:]) if per_layer else (target, offset)
            part = whole[tuple(slice(begin, begin + size) for begin, size in zip(at, shard.shape, strict=True))]
            # Smaller where the vocabulary is padded for the layout; every other shape was compared with the model's.
            shard[tuple(slice(size) for size in part.shape)].copy_(part)
        return target

    def read_object(self, key: str) -> None:
        """None: there is no state of Transformer Engine in an adapter."""
        return None

    def _check(self, config: dict, longlora: LongLora) -> None:
        if config.get("peft_type") != "LORA":
            raise InputError(f"{self.where}: peft_type={config.get('peft_type')} should be LORA")
        for key, ours, name in (("r", longlora.rank, "rank"), ("lora_alpha", longlora.alpha, "alpha")):
            if config.get(key) != ours:
                raise InputError(
                    f"{self.where}: {key}={config.get(key)}; set longlora.{name}, which is {ours}, to that"
                )
        for key in _VARIANTS:
            if config.get(key):
                raise InputError(f"{self.where}: {key}={config[key]} is not supported; adapters here are plain LoRA")
        if config.get("bias", "none") != "none":
            raise InputError(f"{self.where}: bias={config['bias']} is not supported; use none")

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        refuse_pointer(path)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.where}: {WEIGHTS} cannot be read ({str(error).splitlines()[0]})") from None
        return {name.removeprefix(PREFIX): value for name, value in found.items()}

    def _take(self, tensors: dict[str, torch.Tensor], name: str, sizes: tuple[int, ...]) -> torch.Tensor:
        if name not in tensors:
            raise InputError(f"{self.where}: {name} is missing; an adapter here has {self.targets} of every layer")
        value = tensors.pop(name)
        if tuple(value.shape) != sizes:
            raise InputError(f"{self.where}: {name} has shape {list(value.shape)}; this model's is {list(sizes)}")
        return value


def adapter_to_start_from(longlora: LongLora, shape: ModelShape, where: str) -> PeftSource | None:
    """What longlora.init_from names; None where it names nothing.  Raises InputError."""
    if longlora.init_from is None:
        return None
    return PeftSource(Path(longlora.init_from), longlora, shape, f"{where}: longlora.init_from")
