"""An all-reduce over all ranks: whether the sum is right, and the bandwidth.  NCCL on GPUs, Gloo on CPUs.

It runs in a thread of its own, since NCCL may wait forever for a rank that it cannot reach, and the other
checks must still be reported.
"""

import threading
import time
from datetime import timedelta
from typing import Any

from endprompt_megatron.distributed.runtime import Launch
from endprompt_megatron.preflight.rendezvous import Meeting, connect
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN, Finding, join_names

CHECK = "all-reduce"
_ELEMENTS = {"nccl": 2**28, "gloo": 2**22}  # of float32: enough to measure bandwidth, and still quick
_REPEATS = 5
_SLOW = 0.25  # of the link's rate: below that, the traffic probably takes another path


def measure(launch: Launch, seconds: float) -> dict[str, Any]:
    """Take part in the all-reduce; all ranks call.  Returns this rank's result.

    {"backend", "bytes", "seconds", "correct"} with the median time of one all-reduce, or {"error"}; also
    "hangs" if a thread still runs that the process must not wait for.
    """
    result: dict[str, Any] = {}

    def work() -> None:
        try:
            result.update(_reduce(launch, seconds))
        except Exception as error:
            result["error"] = " ".join(str(error).split())[:200] or type(error).__name__

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds + 5)
    if thread.is_alive():
        return {"error": f"did not end within {seconds:g} s", "hangs": True}
    return result


def _reduce(launch: Launch, seconds: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from endprompt_megatron.distributed import runtime

    runtime.take_device(launch)
    backend, device = runtime.backend(), runtime.device()
    # A separate connection: one that waits for a lost rank would block the messages of the other checks.
    store = dist.PrefixStore("reduce", connect(launch, seconds, serve=False))
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            # Gloo raises at the timeout.  NCCL's watchdog ends the process, so the thread is abandoned before that.
            timeout=timedelta(seconds=seconds if backend == "gloo" else 2 * seconds + 60),
        )
        # Small integers, which float32 adds exactly; a pattern, so that misplaced data is noticed.
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


def judge(meeting: Meeting, results: dict[int, dict[str, Any]], link: float | None) -> Finding:
    """The finding from all ranks' results.  `link`: bytes/s from a node's GPUs to the others, if known."""
    if meeting.world_size == 1:
        return Finding(CHECK, "one process: start preflight with srun or torchrun on all nodes to check this", NOT_RUN)
    if not meeting.all_present:
        return Finding(CHECK, "not all ranks take part, see above", NOT_RUN)
    silent = [rank for rank in range(meeting.world_size) if rank not in results]
    broken = {rank: result["error"] for rank, result in results.items() if "error" in result}
    if silent or broken:
        ranks = sorted([*silent, *broken])
        nodes = join_names(dict.fromkeys(meeting.nodes[rank] for rank in ranks))
        reason = next(iter(broken.values()), "no answer")
        return Finding(
            CHECK, f"failed on rank {join_names(ranks)} ({nodes}): {reason}; set NCCL_DEBUG=INFO for details", FAIL
        )
    wrong = [rank for rank, result in results.items() if not result["correct"]]
    if wrong:
        nodes = join_names(dict.fromkeys(meeting.nodes[rank] for rank in wrong))
        return Finding(CHECK, f"wrong sum on rank {join_names(wrong)} ({nodes}): broken GPU, link or driver", FAIL)
    first, n = results[0], meeting.world_size
    seconds = max(result["seconds"] for result in results.values())
    bandwidth = 2 * (n - 1) / n * first["bytes"] / seconds
    found = (
        f"{n} ranks, {first['backend']}, {first['bytes'] / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms: "
        f"bus bandwidth {bandwidth / 1e9:.2f} GB/s, sum correct"
    )
    if link and bandwidth < _SLOW * link:
        advice = f"below a quarter of the link's {link / 1e9:.0f} GB/s: NCCL_DEBUG=INFO shows which network was used"
        return Finding(CHECK, f"{found}; {advice}", WARN)
    return Finding(CHECK, found, OK)
