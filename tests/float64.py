"""Float64 in place of float32, for a comparison that a CPU's order of summation cannot disturb.

Two implementations of one computation differ in float32 by what rounding leaves, which depends on the CPU, on its
libraries and on the number of threads; a real fault of 1e-5 can hide behind it.  Under `Float64` the code runs as it
is, but wherever it, Megatron-Core or transformers asks torch for float32 (`.float()`, `dtype=torch.float32`, a tensor
of the default type) it gets float64: weights, rotary angles, norms, softmax, losses, gradients and their sums, the
optimizer's state.  The library knows nothing of it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """While it is entered, what asks for float32 gets float64.  For the CPU."""

    entered: "Float64 | None" = None

    def __enter__(self) -> "Float64":
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        # torch would hand a whole backward pass to a mode as one call, and run what is in it without the mode.
        self.backward = [
            mock.patch.object(torch.autograd, "has_torch_function", _no),
            mock.patch.object(torch._tensor, "has_torch_function_unary", _no),
        ]
        for patch in self.backward:
            patch.start()
        Float64.entered = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        Float64.entered = None
        for patch in self.backward:
            patch.stop()
        torch.set_default_dtype(self.before)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if Float64.entered is not self:
            return function(*args, **kwargs)
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        result = function(*map(_wider, args), **{key: _wider(value) for key, value in kwargs.items()})
        if isinstance(result, str):
            # Megatron's optimizer asks for a type's name and takes float32's and the half ones'.  cpu.py, which makes
            # it a CUDA type's, is asked twice: torch looks up Tensor.type again for a mode.
            return result.replace("cuda.", "").replace("DoubleTensor", "FloatTensor")
        return result


def _no(_tensors: Any) -> bool:
    return False


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def as_stored() -> Iterator[None]:
    """Within Float64: float32 is float32 again, for what reads files.  Tensors that are filled keep their type."""
    entered, default = Float64.entered, torch.get_default_dtype()
    Float64.entered = None
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        Float64.entered = entered
        torch.set_default_dtype(default)


def in_float64(function: Callable, *args: Any) -> Any:
    """`function(*args)` under Float64; checkpoints are read as they are stored.  Importable by name, for ranks."""
    from endprompt_megatron.checkpoint.torch_dist import Checkpoint

    with mock.patch.object(Checkpoint, "read", as_stored()(Checkpoint.read)), Float64():
        return function(*args)


def widened(model: Any) -> Any:
    """Under Float64: a model of transformers in float64, with rotary frequencies that were never rounded."""
    model = model.float()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model
