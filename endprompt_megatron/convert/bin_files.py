"""Hugging Face weights in the older pytorch_model.bin: torch's pickle, read as tensors or not at all.

The file is mapped into memory, so that a part of a tensor is read when it is asked for, as from safetensors.
"""

import pickle
from collections.abc import KeysView
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt_megatron.common.errors import InputError

_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


class BinFile:
    """One file, with the interface of safetensors.safe_open."""

    def __init__(self, path: Path):
        """Raises InputError if the file is damaged, or holds anything but tensors: a pickle could run code."""
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path}: refused, it holds more than tensors, and loading it would run its code "
                f"({_reason(error)}); get the model's safetensors files"
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
            if "mmap" in str(error):
                raise InputError(
                    f"{path}: not in the format of torch 1.6 and later (empty, truncated, or older than that); get "
                    "the model's safetensors files"
                ) from error
            raise InputError(f"{path}: cannot be read as torch's weights ({_reason(error)}); truncated?") from error
        if not isinstance(values, dict):
            raise InputError(f"{path}: holds one {type(values).__name__} instead of tensors by name")
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise InputError(f"{path}: {name} is a {type(value).__name__}, not a dense tensor")
        self.tensors: dict[str, torch.Tensor] = values

    def keys(self) -> KeysView[str]:
        return self.tensors.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach()

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(self.tensors[name].detach())


@dataclass(frozen=True)
class _Slice:
    tensor: torch.Tensor

    def get_dtype(self) -> str:
        return _CODES.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
        return self.tensor[box]


def _reason(error: Exception) -> str:
    """The sentence that says what was refused; torch puts advice before and after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return told.removeprefix("WeightsUnpickler error: ")[:160] or type(error).__name__
