"""A rank stays on its GPU's cores, as the driver's tool and the kernel name them, and nowhere else than it may."""

import os
import stat

import pytest

from endprompt_megatron.distributed import numa

SAID = "GPU-aaaa-1, 00000000:1B:00.0\nGPU-bbbb-2, 00000000:9D:00.0\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Two GPUs, a directory for each, and a process that may use cores 0 to 7."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{SAID}'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    for address, cores in (("0000:1b:00.0", "0-1,4\n"), ("0000:9d:00.0", "8-15\n")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "local_cpulist").write_text(cores)
    bound = []
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(numa, "_DEVICES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _pid, cores: bound.append(cores))
    return bound


def test_a_rank_is_bound_to_the_cores_beside_its_gpu(machine):
    assert numa.stay_beside_gpu("aaaa-1") == {0, 1, 4}
    assert machine == [{0, 1, 4}]


@pytest.mark.parametrize("uuid", ["GPU-bbbb-2", "cccc"], ids=["cores of others", "unknown"])
def test_nothing_is_changed_where_it_cannot_be(machine, uuid):
    assert numa.stay_beside_gpu(uuid) == set()
    assert machine == []


def test_nothing_is_changed_without_the_drivers_tool(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert numa.stay_beside_gpu("aaaa-1") == set()
    assert machine == []
