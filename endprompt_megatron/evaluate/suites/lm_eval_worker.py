"""The process in which lm-eval runs: `python -m endprompt_megatron...lm_eval_worker JOB.json ANSWER.json`.

The answer is {"refused": why}, or {"results": {task: {"metrics", "shots", "questions"}}, "version"}; of a job that
only checks, {"unavailable": {task: why}}.
"""

import json
import os
import sys
from pathlib import Path


def main(job: dict) -> dict:
    """Check that every task can be had, then load the model once and ask each with its number of examples."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=job["include"])
    unavailable = {}
    for name in job["tasks"]:
        if name not in manager.all_tasks:
            return {"refused": f"lm-eval {lm_eval.__version__} has no task {name!r}; `lm-eval ls tasks` lists them"}
        try:
            manager.load([name])
        except OSError as error:  # what datasets and evaluate raise for data they neither have nor reach
            reason = " ".join(str(error).split())[:160]
            unavailable[name] = (
                f"its data is not in the caches and cannot be reached ({reason}); "
                "run once on a connected machine, and copy its HF_HOME"
            )
            if not job.get("check"):
                return {"refused": f"{name}: {unavailable[name]}"}
    if job.get("check"):
        return {"unavailable": unavailable}
    model = _model(job)
    results = {name: _asked(model, manager, name, shots, job) for name, shots in job["tasks"].items()}
    return {"results": results, "version": lm_eval.__version__}


def _model(job: dict):
    """lm-eval's own model class around the directory."""
    from lm_eval.api.registry import get_model

    from endprompt_megatron.distributed import runtime

    more = {"batch_size": job["batch_size"]}
    if job["backend"] == "hf":
        # Without a device it takes a GPU for granted.
        more["device"] = str(runtime.device())
    return get_model(job["backend"]).create_from_arg_obj(job["model"], more)


def _asked(model, manager, name: str, shots: int | None, job: dict) -> dict:
    """One task, which may be a group of others."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=shots,
        limit=job["limit"],
        task_manager=manager,
        apply_chat_template=job["chat"],
        log_samples=False,
        confirm_run_unsafe_code=os.environ.get("HF_ALLOW_CODE_EVAL") == "1",
    )
    metrics = found["results"][name]
    counts = found["n-samples"]
    leaves = [leaf for leaf in counts if leaf == name] or list(counts)  # only this task's: it was asked alone
    return {
        "metrics": {key: value for key, value in metrics.items() if "," in key},
        "shots": max(found["n-shot"].get(leaf, 0) for leaf in leaves),
        "questions": sum(counts[leaf]["effective"] for leaf in leaves),
    }


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
