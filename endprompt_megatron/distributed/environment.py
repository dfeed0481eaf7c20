"""Environment variables that CUDA, cuBLAS and NCCL read when they start: set before anything asks for a device."""

import os
import subprocess

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe

# NVIDIA's on H100s (Megatron-Bridge 0.6, perf_recipes/llama/h100): NCCL's kernels go first, norms leave SMs to them.
_HOPPER = {
    **{"TORCH_NCCL_HIGH_PRIORITY": "1", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"},
    **{"NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0"},
    **{"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20"},
}
_HOPPER_PIPELINE = {"NCCL_P2P_NET_CHUNKSIZE": "2097152"}  # for the activations that stages send

# The same sums in the same order in every run.  A workspace of another size would do too.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def set_before_cuda(recipe: Recipe, where: str) -> dict[str, str]:
    """Set what the recipe needs of CUDA's libraries and returns it; nothing on a machine without a GPU.

    Raises InputError if one is already set to a value that would change the run.
    """
    capability = _compute_capability()
    if capability is None:
        return {}
    wanted = dict(_DETERMINISTIC) if recipe.train.deterministic else {}
    refuse_others(wanted, where)
    p = recipe.parallel
    chosen = {}  # unless the user has chosen
    if (p.sequence or p.context > 1) and capability < 10:
        # Up to Hopper kernels then start in the order in which they are launched, so a gather starts before the GEMM.
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if capability == 9:
        chosen |= _HOPPER | (_HOPPER_PIPELINE if p.pipeline > 1 else {})
    wanted |= {name: value for name, value in chosen.items() if name not in os.environ}
    os.environ.update(wanted)
    return wanted


def refuse_others(wanted: dict[str, str], where: str) -> None:
    """Raise InputError if the environment has another value of a variable."""
    for name, value in wanted.items():
        found = os.environ.get(name, value)
        if found != value:
            raise InputError(f"{name}={found} is set, and {where} needs {name}={value}: unset it")


def _compute_capability() -> float | None:
    """Of the first GPU, by the driver's own tool: CUDA's functions would start CUDA.  None where there is none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return float(said.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
