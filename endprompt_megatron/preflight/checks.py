"""What can be known to go wrong is known before the first GPU-hour is spent: every check, one table, one verdict.

Runs on every rank (srun, torchrun, mpirun), or as one process that checks what one process can.  `run` is
the story; a check is a function of one of this package's other modules.  Rank 0 alone judges and speaks.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import EXIT_INPUT, InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import load_resolved
from endprompt_megatron.distributed.runtime import launched_as, quiet_libraries
from endprompt_megatron.model.shape import ModelShape, read_shape
from endprompt_megatron.preflight import allreduce, cluster, filesystem, gpu_memory, node
from endprompt_megatron.preflight.rendezvous import Meeting
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, Finding, by_node, checked, exit_code


@dataclass(frozen=True)
class Options:
    """What the command line adds to a recipe; see tools/preflight.py."""

    checkpoints: int | None = None
    world_size: int | None = None
    export: Path | None = None
    gpu: str | None = None
    timeout: float = 120.0


@dataclass(frozen=True)
class Outcome:
    """The exit code, the same on all ranks; the findings on rank 0; whether a thread hangs that none can end."""

    code: int
    findings: list[Finding]
    hangs: bool = False


def run(where: str, overrides: list[str], options: Options) -> Outcome:
    """Check a recipe on the ranks that were started.  All ranks call.

    Raises InputError if this rank cannot reach the others, or if the recipe cannot be read where rank 0 is.
    """
    quiet_libraries()
    launch = launched_as()
    recipe = problem = None
    try:
        recipe = load_resolved(where, overrides)
    except InputError as error:
        problem = str(error)
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
    if meeting.leads:
        digest = hashlib.sha256(recipe.as_yaml().encode()).hexdigest()[:10]
        meeting.post("facts", node.node_facts(_inputs(recipe)) | {"recipe": digest})
        written = filesystem.share(meeting, recipe.run_dir)
        offsets = meeting.clock_offsets()
    part = allreduce.measure(launch, meeting.seconds) if meeting.whole and meeting.world_size > 1 else {}
    meeting.post("reduce", part)
    if meeting.rank:
        # Rank 0 reads the model's and the data's headers meanwhile, on file systems that may be slow.
        return Outcome(meeting.hear("verdict", 600 + meeting.seconds), [], hangs="hangs" in part)

    facts = {meeting.nodes[r]: fact for r, fact in meeting.gather("facts", meeting.leaders.values()).items()}
    parts = meeting.gather("gpu", meeting.nodes)
    reduced = meeting.gather("reduce", meeting.nodes, meeting.seconds + 15)
    findings = [cluster.processes(meeting), *_silent(meeting, facts)]
    findings += _machine(recipe, where, options, meeting, facts, parts)
    findings += [*written, *checked(filesystem.HELD, filesystem.lock, recipe.run_dir)]
    findings += [cluster.clock(meeting, offsets)]
    findings += checked(allreduce.CHECK, allreduce.judge, meeting, reduced, _link(meeting))
    findings += _files(recipe, options)
    code = exit_code(findings)
    meeting.tell("verdict", code)
    return Outcome(code, findings, hangs="hangs" in part)


def _silent(meeting: Meeting, facts: dict) -> list[Finding]:
    """Nodes that came and then said nothing, and nodes whose recipe is another one."""
    lost = [name for name in meeting.leaders if name not in facts]
    found = [Finding("nodes", f"no answer from {', '.join(lost)}", FAIL)] if lost else []
    digests = {name: fact["recipe"] for name, fact in facts.items()}
    if len(set(digests.values())) > 1:
        found.append(Finding("same recipe", f"nodes read different recipes: {by_node(digests)}", FAIL))
    return found


def _machine(recipe: Recipe, where: str, options: Options, meeting: Meeting, facts: dict, parts: dict) -> list[Finding]:
    """Whether the recipe is legal here, and the machines as training wants them."""
    from endprompt_megatron.distributed.hardware import here
    from endprompt_megatron.distributed.te import attention_environment

    on_gpu = any(part["visible"] for part in parts.values())
    world, said = processes_of_the_run(recipe, meeting, options)
    per_node = None if options.world_size is None else -(-options.world_size // len(meeting.leaders))
    findings = checked("recipe", _legal, recipe, where, world, said, options.gpu)
    findings += checked("GPUs", cluster.gpus, recipe, meeting, parts, per_node, options.gpu)
    findings += checked(gpu_memory.CHECK, gpu_memory.fits, recipe, world, parts, options.gpu)
    findings += cluster.gpu_errors(facts)
    findings += cluster.library_versions(recipe, facts, on_gpu, elsewhere=options.gpu is not None and not on_gpu)
    findings += cluster.limits(meeting, facts, on_gpu)
    findings += cluster.environment(recipe, facts, on_gpu, attention_environment(recipe, here()))
    findings += cluster.inputs(facts)
    return findings


def processes_of_the_run(recipe: Recipe, meeting: Meeting, options: Options) -> tuple[int, str]:
    """How many processes the recipe is checked for, and why so many.

    A preflight that was started alone, on a login node or in a batch script, is not the run: there it is
    the fewest that the layout takes.
    """
    p = recipe.parallel
    if options.world_size is not None:
        return options.world_size, "--world-size"
    if meeting.world_size > 1:
        return meeting.world_size, "as started"
    return p.tensor * p.pipeline * p.context, "the fewest of this layout; --world-size N says another number"


def _legal(recipe: Recipe, where: str, world: int, said: str, gpu: str | None) -> Finding:
    """Every rule, for this machine or for a kind of GPU that is not here, as on a login node."""
    from endprompt_megatron.config.constraints.check import check, check_for
    from endprompt_megatron.distributed.hardware import of_kind

    if gpu is None:
        check(recipe, where, world_size=world)
    else:
        check_for(recipe, where, read_shape(recipe.model.hf), world_size=world, hardware=of_kind(gpu))
    p = recipe.parallel
    layout = f"TP {p.tensor}, PP {p.pipeline}, CP {p.context}, DP {world // (p.tensor * p.pipeline * p.context)}"
    return Finding("recipe", f"{where}: legal on {world} process{'es' * (world > 1)} ({said}): {layout}")


def _link(meeting: Meeting) -> float | None:
    """Bytes/s at which a node's GPUs talk to what is farthest: other nodes, or each other; None if not known."""
    from endprompt_megatron.distributed.hardware import here

    gpu = here().gpu
    if gpu is None or not gpu.network:
        return None
    local = sum(name == meeting.node for name in meeting.nodes.values())
    return min(gpu.nvlink, gpu.network * local) if len(meeting.leaders) > 1 else gpu.nvlink


def _files(recipe: Recipe, options: Options) -> list[Finding]:
    """The model's files, the data, and room for what is written.  All of it needs the model's shape."""
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
    """What every node reads, by the recipe's key."""
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
    """End the process where a thread waits for ever for ranks that do not answer; return otherwise."""
    if outcome.hangs:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(outcome.code)
