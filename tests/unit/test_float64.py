"""The switch that makes float64 of float32 reaches all that is compared with it."""

import pytest
import torch
from float64 import Float64, as_stored

from endprompt_megatron.model.attention import RMSNorm


class Inner(torch.autograd.Function):
    """Asks for float32 forward and backward, and says what it got."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        Inner.seen.append(x.float().dtype)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Inner.seen.append(gradient.to(torch.float32).dtype)
        return gradient


def recomputed(x):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(Inner.apply, x, use_reentrant=True)


@pytest.mark.parametrize(("function", "passes"), [(Inner.apply, 2), (recomputed, 3)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("how", ["tensor", "autograd"])
def test_forward_and_backward_passes_are_in_float64(function, passes, how):
    Inner.seen = []
    with Float64():
        x = torch.ones(3, requires_grad=True)
        total = function(x).sum()
        total.backward() if how == "tensor" else torch.autograd.backward(total)
    assert Inner.seen == [torch.float64] * passes
    assert x.grad.dtype == torch.float64


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2),
        lambda: torch.zeros(2, dtype=torch.float32),
        lambda: torch.arange(2).float(),
        lambda: torch.arange(2).to(torch.float32),
        lambda: torch.tensor(1.5),
        lambda: torch.ones(2).softmax(-1, dtype=torch.float32),
        lambda: torch.nn.Linear(2, 2).weight,
    ],
)
def test_what_asks_for_float32_gets_float64(make):
    with Float64():
        assert make().dtype == torch.float64
    assert make().dtype == torch.float32


def test_files_are_read_as_they_are_stored(tmp_path):
    with Float64():
        with as_stored():
            assert torch.zeros(2).dtype == torch.zeros(2, dtype=torch.float32).dtype == torch.float32
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64


def test_a_fault_of_a_billionth_shows():
    """Our RMSNorm, which works in float32 inside, agrees with its formula to the last digits."""
    from types import SimpleNamespace

    with Float64():
        norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 64)
        x = torch.randn(5, 64)
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert ((norm(x) - expected).norm() / expected.norm()).item() < 1e-15
        assert ((norm(x) * (1 + 1e-9) - expected).norm() / expected.norm()).item() > 0.9e-9
