"""Preflight on real GPUs: what it says of them is what torch says, and NCCL adds right."""

import os

import pytest
import torch
from parallel.preflighting import check
from parallel.ranks import Ranks
from unit.starting import RECIPE, write_tokens

from endprompt_megatron.distributed.runtime import launched_as
from endprompt_megatron.preflight import allreduce, node
from endprompt_megatron.preflight.rendezvous import connect


def looked_at() -> tuple[dict, dict, dict]:
    """Facts and versions of this rank, and an all-reduce over it alone, NCCL's communicator included."""
    launch = launched_as()
    store = connect(launch, 30.0)
    part = allreduce.measure(launch, 60.0)
    del store
    return node.process_facts(launch), node.versions()[0], part


@pytest.mark.gpu
def test_what_is_said_of_the_gpu_is_what_torch_says(rank):
    facts, versions, part = rank.run(1, looked_at)[0]
    name, gib = facts["visible"][facts["own"]]
    properties = torch.cuda.get_device_properties(0)
    assert (name, gib) == (properties.name, properties.total_memory / 2**30)
    assert 0 < facts["free_gib"] <= gib
    assert versions["CUDA"] == torch.version.cuda
    assert versions["driver"].split(".")[0].isdigit()
    assert (part["backend"], part["correct"], part["bytes"]) == ("nccl", True, 2**30), part


@pytest.fixture
def place(tmp_path, model):
    _, hf, megatron = model
    os.symlink(hf, tmp_path / "hf")
    os.symlink(megatron, tmp_path / "megatron")
    write_tokens(tmp_path / "train", 4000)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("float32", "bfloat16"))
    return tmp_path


@pytest.mark.gpu
def test_two_processes_on_one_gpu_are_refused(place):
    pool = Ranks(2, gpu=True)
    try:
        (code, found, _), _ = pool.run(2, one_gpu, str(place))
    finally:
        pool.close()
    assert code == 2
    assert found["GPUs"][0] == "FAIL"
    assert "1 for 2 processes" in found["GPUs"][1]


def one_gpu(directory: str) -> tuple:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    return check(directory, 2, {}, 60.0, [])


@pytest.mark.two_gpus
def test_two_gpus_are_ready_and_the_bandwidth_is_stated(place):
    pool = Ranks(2, gpu=True)
    try:
        (code, found, _), _ = pool.run(2, check, str(place), 2, {}, 60.0, [])
    finally:
        pool.close()
    assert code == 0, found
    assert found["all-reduce"][1].startswith("2 ranks, nccl, 1024 MiB in ")
