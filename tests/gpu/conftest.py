"""What the tests on a GPU share: when they run, a small model of LLaMA's head dimension, processes with a GPU.

python -m pytest tests/gpu          (one command; make test runs it too, and skips it where there is no GPU)
"""

import importlib.util

import pytest
import torch
from parallel.ranks import Ranks
from small import small_llama

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron

TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None


def pytest_collection_modifyitems(items: list) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capability = torch.cuda.get_device_capability() if gpus else (0, 0)
    missing = {
        "gpu": None if gpus else "needs an NVIDIA GPU",
        "two_gpus": None if gpus > 1 else "needs two NVIDIA GPUs",
        "fp8": None if capability >= (8, 9) else "needs a GPU with FP8 (Hopper or later)",
        "with_te": None if TRANSFORMER_ENGINE else "needs Transformer Engine",
        "without_te": "Transformer Engine is installed and takes the layers" if TRANSFORMER_ENGINE else None,
    }
    for item in items:
        if "tests/gpu/" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.gpu)
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


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
