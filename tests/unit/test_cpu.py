"""Running without CUDA is asked for, never stumbled into."""

import subprocess
import sys

import pytest
import torch
from small import PATIENCE, ROOT

IMPORT_EVERYTHING = """
import pkgutil, importlib, torch, torch.cuda.random

def seen():
    factories = "tensor as_tensor zeros ones empty full arange rand randn randint zeros_like ones_like empty_like"
    found = {name: getattr(torch, name) for name in factories.split()}
    for owner, names in (
        (torch.Tensor, "cuda to type pin_memory new_empty"),
        (torch.nn.Module, "cuda to"),
        (torch.cuda, "is_available current_device device_count set_device synchronize empty_cache manual_seed "
                     "manual_seed_all reset_peak_memory_stats get_rng_state set_rng_state"),
        (torch.cuda.random, "get_rng_state set_rng_state"),
        (torch.cuda.nvtx, "range_push range_pop mark"),
    ):
        for name in names.split():
            found[f"{owner.__name__}.{name}"] = getattr(owner, name)
    return found

before = seen()
import endprompt_megatron
names = [m.name for m in pkgutil.walk_packages(endprompt_megatron.__path__, "endprompt_megatron.")]
for name in names:
    importlib.import_module(name)
assert "endprompt_megatron.distributed.cpu" in names and "endprompt_megatron.data.samples.feed" in names, names
changed = [name for name, function in seen().items() if function is not before[name]]
assert not changed, changed

from endprompt_megatron.distributed import cpu
cpu.install()
changed = [name for name, function in seen().items() if function is not before[name]]
assert {"zeros", "Tensor.cuda", "torch.cuda.current_device"} <= set(changed), changed
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.ones(2).cuda().to("cuda:0").device.type == "cpu"
kept = seen()
cpu.install()
assert seen() == kept, "a second install wraps what is wrapped already"
"""


def test_importing_every_module_changes_nothing_in_torch_and_install_does():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


def test_install_is_refused_where_there_is_cuda(monkeypatch):
    from endprompt_megatron.distributed import cpu

    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="machine with CUDA"):
        cpu.install()
    assert torch.zeros is zeros
