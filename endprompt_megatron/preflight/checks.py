"""Preflight finds what would go wrong before the first GPU-hour is spent: every check, one table, one verdict.

It runs on every rank (srun, torchrun, mpirun), or as one process that checks what one process can.  `run` is
the sequence of steps; the checks are functions of the other modules here.  Only rank 0 judges and prints.
"""

import contextlib
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import EXIT_INPUT, InputError
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import load_resolved
from endprompt_megatron.distributed.runtime import launched_as, quiet_libraries
from endprompt_megatron.model.shape import ModelShape, read_shape
from endprompt_megatron.preflight import allreduce, cluster, filesystem, gpu_memory, node
from endprompt_megatron.preflight.rendezvous import Meeting
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, Finding, checked, exit_code, group_by_node


@dataclass(frozen=True)
class Options:
    """The command-line options beside the recipe; see tools/preflight.py."""

    checkpoints: int | None = None
    world_size: int | None = None
    export: Path | None = None
    gpu: str | None = None
    timeout: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """The exit code, the same on all ranks; the findings, on rank 0; whether a thread hangs that cannot be ended."""

    code: int
    findings: list[Finding]
    hangs: bool = False


def run(where: str, overrides: list[str], options: Options) -> Outcome:
    """Check a recipe on the ranks that were started.  All ranks call this.

    Raises InputError if this rank cannot reach the others, or if the recipe cannot be read where rank 0 is.
    """
    quiet_libraries()
    launch = launched_as()
    recipe = problem = None
    try:
        recipe = load_recipe(where, overrides)
    except InputError as error:
        problem = str(error)
    else:
        with contextlib.suppress(InputError):  # the checks below say what is wrong with the model
            recipe = load_resolved(where, overrides)
    if problem and launch.world_size == 1:
        raise InputError(problem)
    meeting = Meeting(launch, problem, options.timeout)
    try:
        if meeting.rank == 0 and problem:
            raise InputError(problem)
        if recipe is None or 0 not in meeting.nodes:
            return Outcome(EXIT_INPUT, [])  # rank 0 says why
        return _run(recipe, where, options, meeting, launch)
    finally:
        meeting.leave()


def _run(recipe: Recipe, where: str, options: Options, meeting: Meeting, launch: Any) -> Outcome:
    meeting.post("gpu", node.process_facts(launch))
    written, offsets = [], {}
    if meeting.is_leader:
        digest = hashlib.sha256(recipe.as_yaml().encode()).hexdigest()[:10]
        meeting.post("facts", node.node_facts(_inputs(recipe)) | {"recipe": digest})
        written = filesystem.share(meeting, recipe.run_dir)
        offsets = meeting.clock_offsets()
    result = allreduce.measure(launch, meeting.seconds) if meeting.all_present and meeting.world_size > 1 else {}
    meeting.post("reduce", result)
    if meeting.rank:
        # Meanwhile rank 0 reads the headers of the model and the data, on file systems that may be slow.
        return Outcome(meeting.hear("verdict", 600 + meeting.seconds), [], hangs="hangs" in result)

    facts = {meeting.nodes[r]: fact for r, fact in meeting.gather("facts", meeting.leaders.values()).items()}
    gpus = meeting.gather("gpu", meeting.nodes)
    reduced = meeting.gather("reduce", meeting.nodes, meeting.seconds + 15)
    findings = [cluster.processes(meeting), *_silent(meeting, facts)]
    findings += _machine(recipe, where, options, meeting, facts, gpus)
    findings += [*written, *checked(filesystem.HELD, filesystem.lock, recipe.run_dir)]
    findings += [cluster.clock(meeting, offsets)]
    findings += checked(allreduce.CHECK, allreduce.judge, meeting, reduced, _link(meeting))
    findings += _files(recipe, options)
    code = exit_code(findings)
    meeting.tell("verdict", code)
    return Outcome(code, findings, hangs="hangs" in result)


def _silent(meeting: Meeting, facts: dict) -> list[Finding]:
    """Nodes that stopped answering, and nodes that read a different recipe."""
    lost = [name for name in meeting.leaders if name not in facts]
    found = [Finding("nodes", f"no answer from {', '.join(lost)}", FAIL)] if lost else []
    digests = {name: fact["recipe"] for name, fact in facts.items()}
    if len(set(digests.values())) > 1:
        found.append(Finding("same recipe", f"nodes read different recipes: {group_by_node(digests)}", FAIL))
    return found


def _machine(recipe: Recipe, where: str, options: Options, meeting: Meeting, facts: dict, gpus: dict) -> list[Finding]:
    """Whether the recipe is legal here, and the machines are as training needs them.  `gpus`: node.process_facts."""
    from endprompt_megatron.distributed.hardware import here
    from endprompt_megatron.distributed.te import attention_environment

    on_gpu = any(seen["visible"] for seen in gpus.values())
    world, reason = processes_of_the_run(recipe, meeting, options)
    per_node = None if options.world_size is None else -(-options.world_size // len(meeting.leaders))
    findings = checked("recipe", _legal, recipe, where, world, reason, options.gpu)
    findings += checked("GPUs", cluster.gpus, recipe, meeting, gpus, per_node, options.gpu)
    findings += checked(gpu_memory.CHECK, gpu_memory.fits, recipe, world, gpus, options.gpu)
    findings += cluster.gpu_errors(facts)
    findings += cluster.library_versions(recipe, facts, on_gpu, elsewhere=options.gpu is not None and not on_gpu)
    findings += cluster.limits(meeting, facts, on_gpu)
    findings += cluster.environment(recipe, facts, on_gpu, attention_environment(recipe, here()))
    findings += cluster.inputs(facts)
    return findings


def processes_of_the_run(recipe: Recipe, meeting: Meeting, options: Options) -> tuple[int, str]:
    """How many processes the recipe is checked for, and why that many.

    A single process, on a login node or in a batch script, is not the run: it checks for the fewest processes
    that the layout takes.
    """
    p = recipe.parallel
    if options.world_size is not None:
        return options.world_size, "--world-size"
    if meeting.world_size > 1:
        return meeting.world_size, "as started"
    return p.tensor * p.pipeline * p.context, "the fewest that this layout takes; --world-size N sets another number"


def _legal(recipe: Recipe, where: str, world: int, reason: str, gpu: str | None) -> Finding:
    """Check every rule, for this machine or, as on a login node, for a kind of GPU that is elsewhere."""
    from endprompt_megatron.config.constraints.check import check, check_for
    from endprompt_megatron.distributed.hardware import of_kind

    if gpu is None:
        check(recipe, where, world_size=world)
    else:
        check_for(recipe, where, read_shape(recipe.model.hf), world_size=world, hardware=of_kind(gpu))
    p = recipe.parallel
    layout = f"TP {p.tensor}, PP {p.pipeline}, CP {p.context}, DP {world // (p.tensor * p.pipeline * p.context)}"
    return Finding("recipe", f"{where}: legal on {world} process{'es' * (world > 1)} ({reason}): {layout}")


def _link(meeting: Meeting) -> float | None:
    """Bytes/s between a node's GPUs and the other nodes, or with one node between its GPUs; None if not known."""
    from endprompt_megatron.distributed.hardware import here

    gpu = here().gpu
    if gpu is None or not gpu.network:
        return None
    local = sum(name == meeting.node for name in meeting.nodes.values())
    return min(gpu.nvlink, gpu.network * local) if len(meeting.leaders) > 1 else gpu.nvlink


def _files(recipe: Recipe, options: Options) -> list[Finding]:
    """The model's files, the data, and free space for what is written.  All of these need the model's shape."""
    from endprompt_megatron.preflight import datasets, disk_space, model_files

    checks = (
        (model_files.HF, model_files.hf_checkpoint, ()),
        (model_files.CONVERTED, model_files.converted_checkpoint, ()),
        (model_files.TOKENIZER, model_files.tokenizer, ()),
        ("data", datasets.datasets, ()),
        (disk_space.CHECK, disk_space.free_disk, (options.checkpoints, options.export)),
    )
    shape = _shape(recipe)
    if isinstance(shape, str):
        first, *others = checks
        return [
            Finding(first[0], shape, FAIL),
            *(Finding(name, "needs the model's config.json, see above", NOT_RUN) for name, _, _ in others),
        ]
    return [finding for name, check, rest in checks for finding in checked(name, check, recipe, shape, *rest)]


def _shape(recipe: Recipe) -> ModelShape | str:
    try:
        return read_shape(recipe.model.hf)
    except InputError as error:
        return str(error)


def _inputs(recipe: Recipe) -> dict[str, Path]:
    """The files that every node reads, by recipe key."""
    found = {"model.hf": Path(recipe.model.hf)}
    if recipe.model.init_from is not None:
        found["model.init_from"] = Path(recipe.model.init_from)
    for key, value in (("data.train", recipe.data.train), ("data.valid", recipe.data.valid)):
        prefixes = [value] if isinstance(value, str) else list(value or [])
        for prefix in prefixes:
            if not str(prefix).replace(",", "").replace(" ", "").isdigit():
                found |= {f"{key}={prefix}{end}": Path(f"{prefix}{end}") for end in (".bin", ".idx")}
    return found


def leave(outcome: Outcome) -> None:
    """End the process if a thread waits forever for ranks that do not answer; otherwise return."""
    if outcome.hangs:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(outcome.code)
