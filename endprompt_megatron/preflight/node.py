"""What a process sees of its node: GPUs, versions, limits, files.  Only facts, as JSON values.

cluster.py judges the facts of all nodes.  Nothing here raises: a fact that cannot be determined is None.
"""

import hashlib
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

from endprompt_megatron.distributed import hardware
from endprompt_megatron.distributed.runtime import Launch

# Variables that a GPU run needs beside those that te.py sets, and those that are often left over from debugging.
ENVIRONMENT = (
    *("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING"),
    *("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NVTE_DPA_FP8_RECIPE"),
)


def process_facts(launch: Launch) -> dict[str, Any]:
    """This process's GPUs: `visible` {uuid: [name, GiB]}, `own` the uuid it would train on and its `free_gib`."""
    gpus = hardware.visible_gpus()
    if not gpus:
        return {"visible": {}, "own": None, "free_gib": None}
    own = launch.local_rank % len(gpus)
    return {
        "visible": {gpu.uuid: [gpu.name, gpu.memory_gib] for gpu in gpus},
        "own": gpus[own].uuid,
        "free_gib": hardware.free_memory_gib(own),
    }


def node_facts(paths: dict[str, Path]) -> dict[str, Any]:
    """Facts that a node has once.  `paths`: the run's inputs by recipe key, as this node sees them."""
    found, broken = versions()
    return {
        "versions": found,
        "broken": broken,
        "limits": {
            "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "locked memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        },
        "shm": _free(Path("/dev/shm")),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "inputs": {key: input_summary(path) for key, path in paths.items()},
        "ecc": _ecc_errors(),
    }


def versions() -> tuple[dict[str, str | None], dict[str, str]]:
    """Versions by name, None if not installed; and, with the reason, what is installed but cannot be imported."""
    import torch

    te = hardware.te_version()
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "driver": driver(),
        "Megatron-Core": _distribution("megatron-core"),
        "Transformer Engine": ".".join(map(str, te)) if te is not None else None,
        "transformers": _distribution("transformers"),
        "our code": code_digest(),
    }
    imports = {"Megatron-Core": "megatron.core"}
    if te is not None and hardware.visible_gpus():  # built for another torch or CUDA, it may not load
        imports["Transformer Engine"] = "transformer_engine.pytorch"
    broken = {}
    for name, module in imports.items():
        try:
            imported = importlib.import_module(module)
        except Exception as error:  # an extension that was built for something else can raise anything
            broken[name] = " ".join(str(error).split())[:150] or type(error).__name__
        else:
            # A checkout on PYTHONPATH, as in containers, has no metadata but knows its version.
            found[name] = found[name] or getattr(imported, "__version__", None)
    # After the imports: asked first, torch loads its own cuDNN, and Transformer Engine, which prefers the system's,
    # meets a mixture of the two.
    return found | hardware.cuda_libraries(), broken


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of NVIDIA's kernel driver; None if there is none."""
    path = Path("/sys/module/nvidia/version")
    try:
        return path.read_text().strip()
    except OSError:
        lines = _nvidia_smi("driver_version")
        return lines[0] if lines else None


def _nvidia_smi(field: str) -> list[str]:
    """One field of every GPU as nvidia-smi prints it; empty if it is not installed or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _ecc_errors() -> int:
    """Memory errors since the last reset that could not be corrected, over the node's GPUs."""
    counts = _nvidia_smi("ecc.errors.uncorrected.volatile.total")
    return sum(int(count) for count in counts if count.isdigit())


def code_digest() -> str:
    """A short digest of the sources of endprompt_megatron: it differs between different checkouts."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:10]


def _free(directory: Path) -> int | None:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def input_summary(path: Path) -> str:
    """Enough to tell whether two nodes see the same input: a file's size, or a directory's names and sizes."""
    try:
        if path.is_dir():
            entries = sorted((entry.name, entry.stat().st_size) for entry in path.iterdir() if entry.is_file())
            return f"{len(entries)} files, {hashlib.sha256(repr(entries).encode()).hexdigest()[:8]}"
        return f"{path.stat().st_size} bytes"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({(error.strerror or type(error).__name__).lower()})"
