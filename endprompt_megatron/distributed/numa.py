"""Each rank on the cores beside its GPU: copies to it, and the launching of its kernels, then stay in one NUMA node."""

import os
import subprocess
from pathlib import Path

_DEVICES = Path("/sys/bus/pci/devices")


def stay_beside_gpu(uuid: str) -> set[int]:
    """Bind this process, and threads it starts later, to the cores that the kernel names as local to this GPU.

    uuid: as torch gives it.  Returns the cores; none, and nothing is changed, where the driver or the kernel does not
    say, or where none of them is this process's own (a scheduler may have given it a few of another node).
    """
    address = _address(uuid)
    cores = _local_cores(address) & os.sched_getaffinity(0) if address else set()
    if cores:
        os.sched_setaffinity(0, cores)
    return cores


def _address(uuid: str) -> str | None:
    """The GPU's PCI address as sysfs writes it, 0000:1b:00.0."""
    command = ["nvidia-smi", "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    for line in said.splitlines():
        found, _, address = line.partition(", ")
        if found.removeprefix("GPU-") == uuid.removeprefix("GPU-"):
            domain, rest = address.lower().split(":", 1)
            return f"{domain[-4:]}:{rest}"  # the driver writes eight digits of the domain
    return None


def _local_cores(address: str) -> set[int]:
    """Those of local_cpulist, such as 0-15,64-79."""
    try:
        ranges = (_DEVICES / address / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    cores: set[int] = set()
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
