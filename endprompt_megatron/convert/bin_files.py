"""Hugging Face weights in the older pytorch_model.bin: torch's pickle, read as tensors or not at all.

The file is mapped into memory, so that a slice of a tensor is read when it is asked for, as from safetensors.
"""

import pickle
from pathlib import Path

import torch

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert.safetensors_header import Entry

_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


class BinFile:
    """One file, with what HfWeights uses of safetensors.safe_open."""

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

    def entries(self) -> dict[str, Entry]:
        """Dtypes and shapes by name.  Where the bytes lie is not known."""
        return {
            name: Entry(_code(tensor.dtype), tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in self.tensors.items()
        }

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach()

    def get_slice(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach()


def _code(dtype: torch.dtype) -> str:
    return _CODES.get(dtype, str(dtype).removeprefix("torch."))


def _reason(error: Exception) -> str:
    """The sentence that names what was refused; torch puts advice before and after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refused = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "")
    return refused.removeprefix("WeightsUnpickler error: ")[:160] or type(error).__name__
