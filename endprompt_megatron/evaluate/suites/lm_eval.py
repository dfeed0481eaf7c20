"""Short text: MMLU, GSM8K, HellaSwag and HumanEval, or any other of its tasks, by EleutherAI's lm-eval.

lm-eval is no requirement of this project.  It runs in a process of its own (lm_eval_worker.py), which loads the model
once; what it prints is kept and shown only when it fails.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError, Unavailable
from endprompt_megatron.model.shape import read_shape

WORKER = "endprompt_megatron.evaluate.suites.lm_eval_worker"
_ROOT = Path(__file__).resolve().parents[3]
BACKENDS = ("hf", "vllm")
BATCH_SIZE = 8


@dataclass(frozen=True)
class Short:
    """A task as tables report it."""

    metric: str  # the beginning of lm-eval's key for it
    shots: int  # examples before a question
    runs_code: bool = False  # scoring runs what the model wrote


TASKS = {
    "mmlu": Short("acc,", 5),
    "gsm8k": Short("exact_match,strict-match", 5),
    "hellaswag": Short("acc_norm,", 10),
    "humaneval": Short("pass@1,", 0, runs_code=True),
}


def run(
    model_dir: Path | str,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    *,
    shots: dict[str, int] | None = None,
    backend: str = "hf",
    dtype: str = "bfloat16",
    chat: bool = False,
    include: Path | str | None = None,
) -> dict:
    """Scores in percent of a Hugging Face directory on lm-eval tasks, by default those of TASKS.

    `limit`: only the first so many questions of each (sub)task; `shots` replaces numbers of examples by task; `chat`
    puts questions into the model's chat template; `include`: a directory with lm-eval task files of one's own.

    Returns {"tasks": {name: {"score", "stderr" (or None), "metric", "shots", "questions", "all": every metric as
    lm-eval gives it}}, "mean": {"score", "complete", "missing"} over TASKS, "limit", "lm_eval": version}.
    Raises InputError for what is not installed, unknown tasks, a model that cannot be read, and data that is neither in
    the caches nor within reach; RuntimeError with the end of its output where lm-eval fails otherwise.
    """
    names = list(TASKS if tasks is None else tasks)
    _check(Path(model_dir), names, limit, shots or {}, backend)
    job = {
        "tasks": {name: (shots or {}).get(name, TASKS[name].shots if name in TASKS else None) for name in names},
        "limit": limit,
        "backend": backend,
        "model": {"pretrained": str(Path(model_dir).resolve()), "dtype": dtype},
        "batch_size": BATCH_SIZE,
        "chat": chat,
        "include": _absolute(include),
    }
    answer = _in_a_process(job)
    if "refused" in answer:
        raise InputError(f"short text: {answer['refused']}")
    rows = {name: _row(name, result) for name, result in answer["results"].items()}
    there = [name for name in TASKS if name in rows]
    missing = [name for name in TASKS if name not in rows]
    mean = {
        "score": sum(rows[name]["score"] for name in there) / len(there) if there else None,
        "complete": not missing and limit is None,
        "missing": missing,
    }
    return {"tasks": rows, "mean": mean, "limit": limit, "lm_eval": answer["version"]}


def left_out(tasks: Sequence[str], *, include: Path | str | None = None) -> dict[str, str]:
    """Which of the tasks cannot be asked on this machine, and why: no data, no leave to run the model's code.

    Seen without loading a model.  Raises Unavailable where lm-eval is not installed, InputError for unknown tasks.
    """
    _check_installed("hf")
    reasons = {name: _NO_CODE for name in tasks if not _may_run(name)}
    asked = [name for name in tasks if name not in reasons]
    answer = _in_a_process({"check": True, "tasks": asked, "include": _absolute(include)}) if asked else {}
    if "refused" in answer:
        raise InputError(f"short text: {answer['refused']}")
    return reasons | answer.get("unavailable", {})


_NO_CODE = "runs code that the model writes, on this machine; set HF_ALLOW_CODE_EVAL=1 to allow it"


def _may_run(name: str) -> bool:
    return not (name in TASKS and TASKS[name].runs_code) or os.environ.get("HF_ALLOW_CODE_EVAL") == "1"


def _absolute(include: Path | str | None) -> str | None:
    return None if include is None else str(Path(include).resolve())


def _check_installed(backend: str) -> None:
    for module, package in (("lm_eval", "lm-eval"), *([("vllm", "vllm")] if backend == "vllm" else [])):
        if importlib.util.find_spec(module) is None:
            raise Unavailable(f"short text: needs {package}, which is not installed; `pip install {package}`")


def _check(model_dir: Path, names: list[str], limit: int | None, shots: dict[str, int], backend: str) -> None:
    """Raise InputError for all that can be seen without lm-eval."""
    if not names or len(set(names)) < len(names):
        raise InputError(f"short text: tasks {','.join(names) or 'none'}; name each once, such as {','.join(TASKS)}")
    if limit is not None and limit < 1:
        raise InputError(f"short text: {limit} questions a task; use 1 or more")
    for name, number in shots.items():
        if name not in names or number < 0:
            raise InputError(f"short text: {number} examples for {name}; use 0 or more, for one of {', '.join(names)}")
    if backend not in BACKENDS:
        raise InputError(f"short text: there is no backend {backend!r}; use one of {', '.join(BACKENDS)}")
    _check_installed(backend)
    for name in names:
        if not _may_run(name):
            raise InputError(f"short text: {name} {_NO_CODE}, or leave the task out")
    read_shape(model_dir)


def _in_a_process(job: dict) -> dict:
    """What lm_eval_worker.py makes of `job`.  Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(prefix="short-text-") as scratch:
        asked, answered, log = (Path(scratch) / name for name in ("job.json", "answer.json", "log"))
        asked.write_text(json.dumps(job))
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-m", WORKER, str(asked), str(answered)]
        with open(log, "wb") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, check=False, env={**os.environ, "PYTHONPATH": path}
            )
        if done.returncode or not answered.is_file():
            end = log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"lm-eval ended with exit code {done.returncode}; the end of its output:\n{end}")
        return json.loads(answered.read_text())


def _row(name: str, result: dict) -> dict:
    """One task's line of the table from lm-eval's metrics, "acc,none" and the like."""
    metrics = result["metrics"]
    scores = [key for key in metrics if "_stderr," not in key]
    beginning = TASKS[name].metric if name in TASKS else ""
    key = next((key for key in scores if key.startswith(beginning)), None)
    if key is None:
        raise RuntimeError(f"lm-eval gave no {beginning!r} for {name}, only {', '.join(scores)}")
    metric, _, variant = key.partition(",")
    stderr = metrics.get(f"{metric}_stderr,{variant}")
    return {
        "score": 100 * metrics[key],
        "stderr": 100 * stderr if isinstance(stderr, float) else None,
        "metric": key,
        "shots": result["shots"],
        "questions": result["questions"],
        "all": metrics,
    }
