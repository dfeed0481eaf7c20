"""Judge the facts of all nodes: processes, GPUs, versions, limits, environment, inputs, clocks.

Pure functions of the facts that node.py collects, called on rank 0.  Nodes that differ are named.
"""

from typing import Any

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.preflight.rendezvous import Meeting
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN, Finding, group_by_node, join_names, worst

Facts = dict[str, dict[str, Any]]  # by node, from its first rank

MEGATRON = ((0, 16), (0, 20))  # from the first, up to but without the second
TE = (2, 9)
TORCH = (2, 6)
CUDNN_FOR_FP8_ATTENTION = 90700
SKEW = 1.0  # seconds; beyond that, logs, file times and Slurm's deadlines are misleading
_MAY_DIFFER = {"driver"}  # training works on a cluster that is being updated


def processes(meeting: Meeting) -> Finding:
    """Which ranks arrived, and whether all of them could read the recipe."""
    check, world = "processes", meeting.world_size
    if world == 1:
        return Finding(check, f"1 process on {meeting.node}; checks between nodes are left out", OK)
    problems = []
    if meeting.absent:
        problems.append(f"rank {join_names(meeting.absent, 16)} did not arrive within {meeting.seconds:g} s")
    for problem in dict.fromkeys(problem for _, problem in meeting.refused.values()):
        nodes = dict.fromkeys(node for node, other in meeting.refused.values() if other == problem)
        problems.append(f"{join_names(nodes)}: {problem}")
    if problems:
        return Finding(check, f"{len(meeting.nodes)} of {world} processes take part: {'; '.join(problems)}", FAIL)
    counts = {node: sum(other == node for other in meeting.nodes.values()) for node in meeting.leaders}
    found = f"{world} processes on {len(counts)} node{'s' * (len(counts) > 1)}"
    if len(set(counts.values())) > 1:
        return Finding(check, f"{found}, not the same number on each: {group_by_node(counts)}", WARN)
    return Finding(check, found)


def gpus(
    recipe: Recipe, meeting: Meeting, seen: dict[int, dict], per_node: int | None, elsewhere: str | None
) -> list[Finding]:
    """Whether each process has a GPU, all of one kind and with free memory.  `seen`: node.process_facts by rank.

    `per_node` overrides how many a node needs; `elsewhere` is the kind of GPU that the run will use, for checks
    on a machine without one.
    """
    visible: dict[str, dict[str, list]] = {node: {} for node in meeting.leaders}
    wanted = dict.fromkeys(meeting.leaders, per_node or 0)
    shared: list[str] = []
    taken: set[tuple[str, str]] = set()
    for rank, facts in sorted(seen.items()):
        node = meeting.nodes[rank]
        visible[node].update(facts["visible"])
        wanted[node] += 0 if per_node else 1
        if facts["own"] and (node, facts["own"]) in taken:
            shared.append(node)
        taken.add((node, facts["own"]))
    if not any(visible.values()) and elsewhere:
        return [Finding("GPUs", f"none here: the recipe is checked for --gpu {elsewhere}", WARN)]
    if not any(visible.values()):
        if recipe.precision.fp8:
            return [Finding("GPUs", f"no GPU, but precision.fp8={recipe.precision.fp8} needs one", FAIL)]
        return [Finding("GPUs", "no GPU: training runs on CPUs", WARN)]
    kinds = {
        node: ", ".join(sorted({f"{n} {g:.0f} GiB" for n, g in found.values()})) for node, found in visible.items()
    }
    counts = {node: len(found) for node, found in visible.items()}
    found = group_by_node({node: f"{counts[node]} x {kinds[node]}" if counts[node] else "none" for node in counts})
    short = [
        f"{node} has {counts[node]} for {wanted[node]} processes" for node in counts if counts[node] < wanted[node]
    ]
    if short or shared:
        both = f"processes share a GPU on {join_names(dict.fromkeys(shared))}: start one process per GPU"
        return [Finding("GPUs", f"{found}: {join_names(short) or both}", FAIL)]
    if len(set(kinds.values())) > 1:
        return [Finding("GPUs", f"{found}: they differ, and the slowest sets the pace", WARN)]
    return [Finding("GPUs", f"{found} per node" if len(counts) > 1 else found), _free_memory(meeting, seen, visible)]


def _free_memory(meeting: Meeting, seen: dict[int, dict], visible: dict) -> Finding:
    """Whether something else uses the GPUs' memory, such as processes that a killed job left behind."""
    used = []
    for rank, facts in seen.items():
        total = visible[meeting.nodes[rank]][facts["own"]][1]
        if total - facts["free_gib"] > 0.05 * total + 1:  # the driver, and this process's own context
            used.append(f"{total - facts['free_gib']:.0f} GiB on {meeting.nodes[rank]} (rank {rank})")
    lowest = min(facts["free_gib"] for facts in seen.values())
    if used:
        return Finding("GPU memory", f"in use by other processes: {join_names(used)}; nvidia-smi lists them", FAIL)
    return Finding("GPU memory", f"at least {lowest:.1f} GiB free on each GPU")


def library_versions(recipe: Recipe, facts: Facts, on_gpu: bool, elsewhere: bool) -> list[Finding]:
    """Whether every library that training needs is installed, supported, loadable and the same on all nodes.

    `elsewhere`: the run will use GPUs of other machines, with the libraries of those machines.
    """
    findings = []
    names = dict.fromkeys(name for fact in facts.values() for name in fact["versions"])
    for name in names:
        values = {node: fact["versions"].get(name) for node, fact in facts.items()}
        present = {value for value in values.values() if value is not None}
        verdict, advice = OK, []
        if len(set(values.values())) > 1:
            verdict = WARN if name in _MAY_DIFFER else FAIL
            advice.append("nodes differ: use the same container or environment on all of them")
        for problem in filter(None, (_wrong(name, value, recipe, on_gpu) for value in sorted(present))):
            verdict = FAIL
            advice.append(problem)
        if not present:
            missing = None if elsewhere else _missing(name, recipe, on_gpu)
            if missing is None:
                continue
            verdict = worst([verdict, missing[0]])
            advice.append(missing[1])
        shown = group_by_node({node: value or "none" for node, value in values.items()})
        findings.append(Finding(name, "; ".join([shown, *advice]), verdict))
    findings += _broken(facts)
    return findings


def _broken(facts: Facts) -> list[Finding]:
    names = dict.fromkeys(name for fact in facts.values() for name in fact["broken"])
    found = []
    for name in names:
        reasons = group_by_node({node: fact["broken"][name] for node, fact in facts.items() if name in fact["broken"]})
        nodes = join_names(node for node, fact in facts.items() if name in fact["broken"])
        found.append(Finding(name, f"installed, but does not load on {nodes}: {reasons}", FAIL))
    return found


def _wrong(name: str, value: str, recipe: Recipe, on_gpu: bool) -> str | None:
    """What is wrong with a version; None if it is supported."""
    if name == "Megatron-Core" and not MEGATRON[0] <= numbers(value)[:2] < MEGATRON[1]:
        return "versions 0.16 to 0.19 are supported"
    if name == "torch" and numbers(value)[:2] < TORCH:
        return "2.6 or later is needed"
    if name == "Transformer Engine" and (on_gpu or recipe.precision.fp8) and numbers(value)[:2] < TE:
        return "2.9 or later is needed"
    if name == "cuDNN" and recipe.precision.fp8_attention and int(value) < CUDNN_FOR_FP8_ATTENTION:
        return "precision.fp8_attention needs cuDNN 9.7 (90700) or later"
    return None


def _missing(name: str, recipe: Recipe, on_gpu: bool) -> tuple[str, str] | None:
    """Verdict and reason for a library that no node has; None if nothing needs it."""
    if name == "Megatron-Core":
        return FAIL, "install megatron-core 0.16 to 0.19"
    if name == "transformers":
        return FAIL, "install requirements.txt"
    if name == "Transformer Engine" and recipe.precision.fp8:
        return FAIL, f"precision.fp8={recipe.precision.fp8} needs 2.9 or later"
    if name == "Transformer Engine" and on_gpu:
        return WARN, "attention and norms run without its fused kernels; NVIDIA's PyTorch container includes it"
    return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0a0+git -> (2, 13, 0)."""
    found = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def limits(meeting: Meeting, facts: Facts, on_gpu: bool) -> list[Finding]:
    """Open files, locked memory for InfiniBand, /dev/shm for NCCL."""
    world, several = meeting.world_size, len(meeting.leaders) > 1
    local = max(sum(node == other for other in meeting.nodes.values()) for node in meeting.leaders)
    files = {node: fact["limits"]["open files"] for node, fact in facts.items()}
    # -1 is RLIM_INFINITY.  Sockets to other ranks, the checkpoint's files, mapped data, libraries.
    required, wished = 256 + 2 * world, max(1024, 8 * world) * (4 if several else 1)
    lowest = min(n for n in files.values() if n >= 0) if any(n >= 0 for n in files.values()) else None
    verdict = OK if lowest is None or lowest >= wished else WARN if lowest >= required else FAIL
    advice = "" if verdict == OK else f"; raise it: ulimit -n {max(wished, 65536)}"
    shown = group_by_node({node: "unlimited" if n < 0 else n for node, n in files.items()})
    found = [Finding("open files (ulimit -n)", shown + advice, verdict)]
    if on_gpu and several:
        locked = {node: fact["limits"]["locked memory"] for node, fact in facts.items()}
        bad = any(n >= 0 for n in locked.values())
        shown = group_by_node({node: "unlimited" if n < 0 else f"{n // 1024} KiB" for node, n in locked.items()})
        advice = "; InfiniBand needs `ulimit -l unlimited`" if bad else ""
        found.append(Finding("locked memory (ulimit -l)", shown + advice, WARN if bad else OK))
    return [*found, _shm(facts, local, on_gpu)]


def _shm(facts: Facts, local: int, on_gpu: bool) -> Finding:
    free = {node: fact["shm"] for node, fact in facts.items()}
    if any(value is None for value in free.values()):
        nodes = join_names(node for node, value in free.items() if value is None)
        return Finding("/dev/shm", f"missing on {nodes}", WARN if on_gpu else OK)
    lowest = min(free.values())
    shown = f"{lowest / 2**30:.1f} GiB free" + (" on the node with the least" if len(free) > 1 else "")
    if on_gpu and local > 1 and lowest < 2**30:
        # NCCL takes about 10 MiB for each pair of GPUs that communicate through it; containers start with 64 MiB.
        verdict = FAIL if lowest < local * 32 * 2**20 else WARN
        return Finding(
            "/dev/shm",
            f"{shown}; NCCL needs it within a node: give the container --shm-size=8g or more",
            verdict,
        )
    return Finding("/dev/shm", shown)


def environment(recipe: Recipe, facts: Facts, on_gpu: bool, needed: dict[str, str]) -> list[Finding]:
    """Variables that GPU training needs, and those that slow it down or contradict what the recipe needs (`needed`)."""
    if not on_gpu:
        return []
    problems: dict[str, list[str]] = {}
    p, verdict = recipe.parallel, WARN
    for node, fact in facts.items():
        e = fact["environment"]
        for name, value in needed.items():
            if e.get(name, value) != value:
                problems.setdefault(f"{name}={e[name]} is set, but the recipe needs {name}={value}", []).append(node)
                verdict = FAIL
        if (p.sequence or p.context > 1) and e.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
            key = "parallel.sequence" if p.sequence else "parallel.context"
            problems.setdefault(f"CUDA_DEVICE_MAX_CONNECTIONS=1 is not set ({key})", []).append(node)
        allocator = e.get("PYTORCH_ALLOC_CONF", e.get("PYTORCH_CUDA_ALLOC_CONF", ""))
        if "expandable_segments:True" not in allocator:
            problems.setdefault("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is not set", []).append(node)
        for name in ("CUDA_LAUNCH_BLOCKING", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
            if e.get(name, "0") not in ("0", ""):
                problems.setdefault(f"{name}={e[name]} slows training down", []).append(node)
    if not problems:
        return [Finding("environment", "as training needs it")]
    lines = [text if len(nodes) == len(facts) else f"{text} on {join_names(nodes)}" for text, nodes in problems.items()]
    return [Finding("environment", "; ".join(lines), verdict)]


def gpu_errors(facts: Facts) -> list[Finding]:
    """GPUs whose memory had errors that could not be corrected; an empty list if there are none."""
    bad = [f"{fact['ecc']} on {node}" for node, fact in facts.items() if fact["ecc"]]
    if not bad:
        return []
    return [
        Finding("GPU errors", f"uncorrected memory errors: {join_names(bad)}; have the GPU reset or replaced", WARN)
    ]


def inputs(facts: Facts) -> list[Finding]:
    """Whether all nodes see the same model, checkpoint and data."""
    if len(facts) == 1:
        return []
    problems = []
    keys = dict.fromkeys(key for fact in facts.values() for key in fact["inputs"])
    for key in keys:
        signs = {node: fact["inputs"].get(key, "missing") for node, fact in facts.items()}
        if len(set(signs.values())) > 1:
            problems.append(f"{key}: {group_by_node(signs)}")
    if problems:
        return [Finding("inputs on all nodes", f"they differ: {'; '.join(problems)}", FAIL)]
    return [Finding("inputs on all nodes", f"{len(facts)} nodes see the same model and data")]


def clock(meeting: Meeting, offsets: dict[str, float]) -> Finding:
    """Clock skew, from the seconds by which each node is ahead of the first."""
    if len(meeting.leaders) == 1:
        return Finding("clock skew", "one node", NOT_RUN)
    silent = [node for node in meeting.leaders if node not in offsets]
    if silent:
        return Finding("clock skew", f"no answer from {join_names(silent)}", FAIL)
    spread = max(offsets.values()) - min(offsets.values())
    if spread <= SKEW:
        return Finding("clock skew", f"{spread:.3f} s at most between {len(offsets)} nodes")
    middle = sorted(offsets.values())[(len(offsets) - 1) // 2]
    off = [
        f"{node} {abs(value - middle):.1f} s {'ahead' if value > middle else 'behind'}"
        for node, value in offsets.items()
        if abs(value - middle) > SKEW / 2
    ]
    return Finding("clock skew", f"{spread:.1f} s: {join_names(off)}; check that NTP or chrony runs there", WARN)
