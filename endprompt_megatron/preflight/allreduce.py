"""An all-reduce over all ranks: the right sum, and at which bandwidth.  NCCL on GPUs, Gloo on CPUs.

It runs in a thread of its own, since NCCL may wait for ever for a rank that it cannot reach, and the other
checks want to be reported.
"""

import threading
import time
from datetime import timedelta
from typing import Any

from endprompt_megatron.distributed.runtime import Launch
from endprompt_megatron.preflight.rendezvous import Meeting, connect
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN, Finding, some

CHECK = "all-reduce"
_ELEMENTS = {"nccl": 2**28, "gloo": 2**22}  # of float32: enough to be about bandwidth, and still quick
_REPEATS = 5
_SLOW = 0.25  # of the link's rate: below, something else than the link carries the traffic


def measure(launch: Launch, seconds: float) -> dict[str, Any]:
    """This rank's part; all ranks call.

    {"backend", "bytes", "seconds", "correct"} with the median time of one all-reduce, or {"error"}; with
    "hangs" if a thread was left behind that the process must not wait for.
    """
    answer: dict[str, Any] = {}

    def work() -> None:
        try:
            answer.update(_reduce(launch, seconds))
        except Exception as error:
            answer["error"] = " ".join(str(error).split())[:200] or type(error).__name__

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds + 5)
    if thread.is_alive():
        return {"error": f"did not end within {seconds:g} s", "hangs": True}
    return answer


def _reduce(launch: Launch, seconds: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from endprompt_megatron.distributed import runtime

    runtime.take_device(launch)
    backend, device = runtime.backend(), runtime.device()
    # A connection of its own: one that waits for a lost rank would keep the messages of the checks waiting.
    store = dist.PrefixStore("reduce", connect(launch, seconds, serve=False))
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            # Gloo raises when it is over.  NCCL's watchdog ends the process: the thread is given up before that.
            timeout=timedelta(seconds=seconds if backend == "gloo" else 2 * seconds + 60),
            device_id=device if backend == "nccl" else None,
        )
        # Small whole numbers, which float32 adds exactly; a pattern, so that a part in another's place shows.
        pattern = torch.arange(_ELEMENTS[backend], device=device, dtype=torch.int32).remainder_(7).float()
        total = pattern + (launch.rank + 1)
        dist.all_reduce(total)
        ranks = launch.world_size
        correct = bool((total == pattern * ranks + ranks * (ranks + 1) / 2).all())
        total.zero_()
        times = []
        for _ in range(_REPEATS):
            dist.barrier()
            runtime.synchronize()
            started = time.perf_counter()
            dist.all_reduce(total)
            runtime.synchronize()
            times.append(time.perf_counter() - started)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return {
        "backend": backend,
        "bytes": total.numel() * total.element_size(),
        "seconds": sorted(times)[_REPEATS // 2],
        "correct": correct,
    }


def judge(meeting: Meeting, parts: dict[int, dict[str, Any]], link: float | None) -> Finding:
    """The finding from all ranks' parts.  `link`: bytes/s that a node's GPUs have to the others, if known."""
    if meeting.world_size == 1:
        return Finding(CHECK, "one process: start it with srun or torchrun on all nodes to check", NOT_RUN)
    if not meeting.whole:
        return Finding(CHECK, "not all ranks take part, see above", NOT_RUN)
    silent = [rank for rank in range(meeting.world_size) if rank not in parts]
    broken = {rank: part["error"] for rank, part in parts.items() if "error" in part}
    if silent or broken:
        ranks = sorted([*silent, *broken])
        nodes = some(dict.fromkeys(meeting.nodes[rank] for rank in ranks))
        reason = next(iter(broken.values()), "no answer")
        return Finding(CHECK, f"failed on rank {some(ranks)} ({nodes}): {reason}; NCCL_DEBUG=INFO says more", FAIL)
    wrong = [rank for rank, part in parts.items() if not part["correct"]]
    if wrong:
        nodes = some(dict.fromkeys(meeting.nodes[rank] for rank in wrong))
        return Finding(CHECK, f"wrong sum on rank {some(wrong)} ({nodes}): broken GPU, link or driver", FAIL)
    part, n = parts[0], meeting.world_size
    seconds = max(part["seconds"] for part in parts.values())
    bandwidth = 2 * (n - 1) / n * part["bytes"] / seconds
    found = (
        f"{n} ranks, {part['backend']}, {part['bytes'] / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms: "
        f"bus bandwidth {bandwidth / 1e9:.2f} GB/s, sum correct"
    )
    if link and bandwidth < _SLOW * link:
        advice = f"below a quarter of the link's {link / 1e9:.0f} GB/s: NCCL_DEBUG=INFO says which network it took"
        return Finding(CHECK, f"{found}; {advice}", WARN)
    return Finding(CHECK, found, OK)
