"""A small recipe and its data, and tools/extend.py called in this process."""

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path

import numpy as np
from small import ROOT

from endprompt_megatron.common.errors import run_cli
from endprompt_megatron.data.indexed import path_of, token_dtype, write_idx

RECIPE = """
model: {hf: hf, init_from: megatron}
context: {target: 256, physical: 64}
data: {train: train}
train: {steps: 10, global_batch_size: 8}
optim: {warmup_steps: 2}
precision: {dtype: float32}
checkpoint: {dir: run}
log: {tensorboard: false}
"""


# Names that a preflight of this recipe has in its table, whatever is wrong (data.train: or data).
PREFLIGHT_CHECKS = {
    *("processes", "recipe", "GPUs", "torch", "Megatron-Core", "open files (ulimit -n)", "/dev/shm", "run directory"),
    *("run lock", "shared file system", "clock skew", "all-reduce", "HF checkpoint", "converted checkpoint"),
    *("tokenizer", "data.train", "free disk"),
}


def write_tokens(prefix: Path, count: int, below: int = 300, seed: int = 0) -> None:
    """An indexed dataset of one document of random tokens, as tools/prepare_data.py would write it."""
    dtype = token_dtype(below)
    tokens = np.random.default_rng(seed).integers(0, below, count).astype(dtype)
    tokens[0] = below - 1
    path_of(prefix, ".bin").write_bytes(tokens.tobytes())
    write_idx(path_of(prefix, ".idx"), np.array([count]), dtype)


def extend_here(directory: str, arguments: list[str], world_size: int) -> tuple:
    """tools/extend.py in this process, started in `directory`: exit code, stdout, stderr."""
    spec = importlib.util.spec_from_file_location("extend", ROOT / "tools" / "extend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.chdir(directory)
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = ["extend.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(module.main)
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()
