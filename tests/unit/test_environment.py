"""What is set before CUDA starts, by a driver's tool that says which GPU there is."""

import os

import pytest

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.environment import set_before_cuda

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine whose nvidia-smi says what it is told to."""

    def of(capability: str | None) -> dict:
        monkeypatch.setattr(os, "environ", {"PATH": str(tmp_path)})
        if capability is not None:
            tool = tmp_path / "nvidia-smi"
            tool.write_text(f"#!/bin/sh\necho '{capability}'\necho '{capability}'\n")
            tool.chmod(0o755)
        return os.environ

    return of


def recipe(*, sequence: bool = False, context: int = 1, deterministic: bool = False) -> Recipe:
    made = Recipe()
    made.parallel.sequence, made.parallel.context, made.train.deterministic = sequence, context, deterministic
    return made


@pytest.mark.parametrize(("capability", "keys"), [("9.0", {"sequence": True}), ("8.0", {"context": 2})])
def test_kernels_start_in_order_up_to_hopper(gpu, capability, keys):
    environment = gpu(capability)
    assert set_before_cuda(recipe(**keys), "test")[CONNECTIONS] == "1"
    assert environment[CONNECTIONS] == "1"


@pytest.mark.parametrize(
    ("capability", "keys"),
    [("10.0", {"sequence": True}), ("9.0", {}), (None, {"sequence": True}), ("?", {"context": 2})],
)
def test_nothing_is_set_elsewhere(gpu, capability, keys):
    environment = gpu(capability)
    assert CONNECTIONS not in set_before_cuda(recipe(**keys), "test")
    assert CONNECTIONS not in environment


@pytest.mark.parametrize("capability", ["8.0", "10.0", None])
def test_settings_for_hopper_are_its_own(gpu, capability):
    gpu(capability)
    assert set_before_cuda(recipe(), "test") == {}


def test_hopper_gets_nvidias_settings_and_a_pipeline_larger_pieces(gpu):
    gpu("9.0")["NCCL_NVLS_ENABLE"] = "1"
    chosen = set_before_cuda(recipe(), "test")
    assert chosen["TORCH_NCCL_HIGH_PRIORITY"] == "1"
    assert chosen["NVTE_BWD_LAYERNORM_SM_MARGIN"] == "20"
    assert "NCCL_NVLS_ENABLE" not in chosen
    assert "NCCL_P2P_NET_CHUNKSIZE" not in chosen
    staged = recipe()
    staged.parallel.pipeline = 2
    assert set_before_cuda(staged, "test") == {"NCCL_P2P_NET_CHUNKSIZE": "2097152"}


def test_what_the_user_set_stays(gpu):
    gpu("9.0")[CONNECTIONS] = "8"
    assert CONNECTIONS not in set_before_cuda(recipe(sequence=True), "test")
    assert os.environ[CONNECTIONS] == "8"


def test_a_deterministic_run_has_its_variables_and_refuses_others(gpu):
    environment = gpu("9.0")
    wanted = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    assert set_before_cuda(recipe(deterministic=True), "test").items() >= wanted.items()
    assert environment.items() >= wanted.items()
    environment["NCCL_ALGO"] = "Tree"
    with pytest.raises(InputError, match="NCCL_ALGO=Tree is set, and test needs NCCL_ALGO=Ring"):
        set_before_cuda(recipe(deterministic=True), "test")
