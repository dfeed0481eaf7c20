"""What the tests on a GPU share: when they run, a small model of LLaMA's head dimension, processes with a GPU.

make gpu runs them, the most telling first, and writes down each outcome; make test runs them too, and skips them where
there is no GPU.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from parallel.ranks import Ranks
from small import small_llama

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

# By what a failure would say about everything after it.
ORDER = ("engine", "step", "checkpoints", "run", "parity", "layouts", "longlora", "preflight")
# A file to which each outcome is appended; the tests that passed by it are not run again.
RECORD = os.environ.get("GPU_RECORD")
TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    passed = _recorded("passed")
    ours = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    config.hook.pytest_deselected(items=[item for item in ours if item.nodeid in passed])
    others = [item for item in items if item not in set(ours)]
    ours = [item for item in ours if item.nodeid not in passed]
    ours.sort(key=lambda item: ORDER.index(item.path.stem.removeprefix("test_").removesuffix("_gpu")))
    items[:] = [*others, *ours]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capability = torch.cuda.get_device_capability() if gpus else (0, 0)
    missing = {
        "gpu": None if gpus else "needs an NVIDIA GPU",
        "two_gpus": None if gpus > 1 else "needs two NVIDIA GPUs",
        "fp8": None if capability >= (8, 9) else "needs a GPU with FP8 (Hopper or later)",
        "with_te": None if TRANSFORMER_ENGINE else "needs Transformer Engine",
        "without_te": "Transformer Engine is installed and takes the layers" if TRANSFORMER_ENGINE else None,
    }
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _recorded(outcome: str) -> set[str]:
    lines = Path(RECORD).read_text().splitlines() if RECORD and Path(RECORD).exists() else []
    return {found["test"] for found in map(json.loads, lines) if found["outcome"] == outcome}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not RECORD or os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.passed):
        return
    expected = getattr(report, "wasxfail", None)
    reason = expected or (report.longrepr[2] if report.skipped else str(report.longrepr or "")[-4000:])
    found = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1), "reason": reason}
    with open(RECORD, "a") as file:
        file.write(json.dumps({**found, "properties": dict(report.user_properties)}) + "\n")


@pytest.fixture(scope="session")
def rank():
    pool = Ranks(1, gpu=True)
    yield pool
    pool.close()


@pytest.fixture
def fresh_rank():
    """A process that has not imported Transformer Engine yet: it reads its environment then."""
    pool = Ranks(1, gpu=True)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Head dimension 128, as LLaMA 7B to 405B have it and TE's fused attention wants it.

    Its weights are smaller than those of the narrow models on the CPU, so that a layer gives out as much.  With
    theirs BF16 alone moves gradients by 13 to 27%, and no comparison in BF16 means anything.
    """
    directory = tmp_path_factory.mktemp("gpu")
    small_llama(
        directory / "hf", hidden_size=512, intermediate_size=1024, num_attention_heads=4, initializer_range=0.03
    )
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    return directory, directory / "hf", directory / "megatron"
