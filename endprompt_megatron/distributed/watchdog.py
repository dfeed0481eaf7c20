"""Name slow ranks and end hung runs, both cheaply enough to leave on.

Stragglers.  The collectives of a step make every rank as slow as the slowest, so the time of a step says nothing.
Three things do not depend on other ranks, and those are timed:
- data: from the start of the step until its batch has been read;
- compute: forward and backward, until gradients are about to be reduced.  The ranks of one tensor, pipeline
  and context parallel group wait for each other in it, so it identifies the slow replica; in a purely
  data-parallel run, the slow rank.  It is timed in one step per interval, since the device must be idle
  before and after;
- probe: a few matrix products of fixed size, once per interval, on this rank's device only.  It identifies the
  GPU within a replica that is hot, throttled or shared.

Hangs.  Each rank's watchdog has its own thread and its own clock, so that a rank that stops (in a read, in a
collective, by SIGSTOP) does not prevent the others from noticing.  If the hung code never releases Python's
lock, faulthandler's own thread, which needs no lock, dumps the stacks and ends the process somewhat later.
"""

import faulthandler
import os
import re
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from endprompt_megatron.common.errors import EXIT_FAILED, InputError, TrainingError, leave_at_once
from endprompt_megatron.distributed import runtime

FLOOR_SECONDS = 60.0
_PATIENCE = 30  # floors that the first steps, saves and validations may always take
_FIRST_STEPS = 3  # of a run, in which kernels are chosen and connections made
_REMEMBERED = 100  # steps, for the median


class Watch:
    """Context manager around the loop.  All ranks call all methods, in the same order.

    `report(values, line)` receives what was found about slow ranks, on rank 0.
    """

    def __init__(
        self,
        run: Path,
        *,
        interval: int,
        factor: float,
        report: Callable[[dict[str, Any], str], None],
        floor: float = FLOOR_SECONDS,
        probe: Callable[[], float] | None = None,
    ) -> None:
        launch = runtime.launched_as()
        names: list = [None] * runtime.world_size()
        dist.all_gather_object(names, f"{socket.gethostname()}, local rank {launch.local_rank}")
        self.watchdog = Watchdog(run / "stacks", dist.get_rank(), names, factor, floor)
        self.names, self.report, self.probe = names, report, probe or _probe_seconds
        self.interval = interval if len(names) > 1 else 0
        self.step = self.counted = 0
        self.data = self.compute = 0.0
        self.began = 0.0

    def __enter__(self) -> "Watch":
        self.watchdog.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """An error that nobody expected ends this rank here, before anything around it is left in good order."""
        together = InputError, TrainingError  # which all ranks raise together
        if isinstance(error, Exception) and not isinstance(error, together) and len(self.names) > 1:
            self.watchdog.say_last_word()
            leave_at_once(error)
        self.watchdog.end()

    def step_begins(self, step: int) -> None:
        self.step = step
        self.watchdog.step_begins(step)
        self.began = time.perf_counter()

    def batch_read(self) -> None:
        self.data += time.perf_counter() - self.began
        self.counted += 1

    def compute_begins(self) -> None:
        if self._timed():
            _rest()
            self.began = time.perf_counter()

    def compute_ends(self) -> None:
        if self._timed():
            _rest()
            self.compute = time.perf_counter() - self.began

    def step_ends(self) -> None:
        """The end of what every step does: saves and validations come after it."""
        if self._timed():
            self._compare()
        self.watchdog.step_ends()

    def _timed(self) -> bool:
        return bool(self.interval) and self.step % self.interval == 0

    def _compare(self) -> None:
        own = torch.tensor([self.data / self.counted, self.compute, self.probe()], dtype=torch.float64)
        self.data, self.counted = 0.0, 0
        own = own.to(runtime.device())
        all_ranks = [torch.empty_like(own) for _ in self.names]
        dist.all_gather(all_ranks, own)
        if runtime.is_rank_zero():
            self.report(*slowest(torch.stack(all_ranks).tolist(), self.names, self.step))


def slowest(times: list[list[float]], names: list[str], step: int) -> tuple[dict[str, Any], str]:
    """Which rank is slowest, by how much and in what, for metrics.jsonl and as one line.

    times [ranks, 3]: seconds of data, compute and probe.  Ratios are to the (lower) median of all ranks.
    """
    own = [data + compute for data, compute, _ in times]
    rank, ratio = _largest(own)
    probe_rank, probe_ratio = _largest([probe for _, _, probe in times])
    data, compute, _ = times[rank]
    values = {
        "rank": rank,
        "host": names[rank],
        "own_s": own[rank],
        "ratio": ratio,
        "data_s": data,
        "compute_s": compute,
        "probe_rank": probe_rank,
        "probe_host": names[probe_rank],
        "probe_ratio": probe_ratio,
    }
    line = (
        f"step {step}  slowest rank {rank} ({names[rank]}): {own[rank]:.3f} s of its own time, "
        f"{ratio:.2f} x the median (data {data:.3f} s, compute {compute:.3f} s); "
        f"slowest device rank {probe_rank} ({names[probe_rank]}): {probe_ratio:.2f} x"
    )
    return {"stragglers": values}, line


def _largest(seconds: list[float]) -> tuple[int, float]:
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    median = statistics.median_low(seconds)
    return rank, seconds[rank] / median if median > 0 else 1.0


def _rest() -> None:
    """Wait for what this rank computes, but not for its communication."""
    if runtime.has_cuda():
        torch.cuda.current_stream().synchronize()


def _probe_seconds() -> float:
    """Seconds of a few matrix products: milliseconds of work, the same on every rank."""
    size, dtype = (4096, torch.bfloat16) if runtime.has_cuda() else (256, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=runtime.device())
    best = float("inf")
    for _ in range(4):  # the first includes start-up; the best is least disturbed by the host
        _rest()
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        _rest()
        best = min(best, time.perf_counter() - begin)
    return best


def group_seconds(floor: float) -> float:
    """How long a collective may take: longer than the watchdog waits before it writes stacks and ends the process.

    `floor`: train.watchdog_floor_s.
    """
    return _last_resort(floor * _PATIENCE, _settle(floor)) + 60


def _settle(floor: float) -> float:
    """Seconds for the other ranks to write, which reach their limit at about the same moment."""
    return min(5.0, floor)


def _last_resort(limit: float, settle: float) -> float:
    """Seconds until faulthandler ends a process whose watchdog cannot."""
    return 1.5 * limit + 6 * settle


class Watchdog:
    """Ends this rank when a step takes too long; the stacks of all its threads are in `stacks`/rank_N.txt.

    The limit is `factor` times the median of the previous steps, and at least `floor` seconds; at least 30 floors
    for the first steps and for what comes between steps (saves, validations); never more than these 30 floors or
    three medians.  With a factor of 0 there is none.
    """

    def __init__(self, stacks: Path, rank: int, names: list[str], factor: float, floor: float) -> None:
        self.stacks, self.rank, self.names, self.factor, self.floor = stacks, rank, names, factor, floor
        self.seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self.settle = _settle(floor)
        self.loop = threading.get_ident()
        self.ended, self.speaking = threading.Event(), threading.Event()
        self.now: tuple[float, str, float] = (time.monotonic(), "the first step", self._limit(between=True))

    def start(self) -> None:
        if not self.factor:
            return
        self.stacks.mkdir(parents=True, exist_ok=True)
        self.path = self.stacks / f"rank_{self.rank}.txt"
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def end(self) -> None:
        if not self.factor:
            return
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        self.thread.join()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()

    def say_last_word(self) -> None:
        """If the watchdog is about to end the process, let it: an error now is of another rank that it has ended."""
        if self.factor and self.speaking.is_set():
            self.thread.join()

    def step_begins(self, step: int) -> None:
        self._begin(f"step {step}", self._limit(between=len(self.seconds) < _FIRST_STEPS))

    def step_ends(self) -> None:
        began, what, _ = self.now
        self.seconds.append(time.monotonic() - began)
        self._begin(f"the time after {what}", self._limit(between=True))

    def _begin(self, what: str, limit: float) -> None:
        self.now = (time.monotonic(), what, limit)
        if self.factor and not self.ended.is_set():
            faulthandler.dump_traceback_later(_last_resort(limit, self.settle), file=self.file, exit=True)

    def _limit(self, between: bool) -> float:
        median = statistics.median(self.seconds) if self.seconds else 0.0
        limit = max(self.floor * (_PATIENCE if between else 1), self.factor * median)
        # No later than the timeout of the groups, which would end the process without a word of where it was.
        return min(limit, max(self.floor * _PATIENCE, 3 * median))

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.floor / 10)):
            began, what, limit = self.now
            taken = time.monotonic() - began
            if taken > limit:
                self._abort(what, taken, limit)

    def _abort(self, what: str, taken: float, limit: float) -> None:
        self.speaking.set()
        where = place_of(sys._current_frames().get(self.loop))
        moment = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            self.file.write(f"{_HEADER}{self.rank} ({self.names[self.rank]}), {moment}, {what}: in {where}\n")
            self.file.flush()
            faulthandler.dump_traceback(file=self.file, all_threads=True)
            os.fsync(self.file.fileno())
            time.sleep(self.settle)
            found = self._places()
            if self.rank == min(found, default=self.rank):
                print(self._verdict(found, what, taken, limit), file=sys.stderr, flush=True)
        finally:
            # No clean-up: it would wait for the thread or the ranks that hang.
            os._exit(EXIT_FAILED)

    def _places(self) -> dict[int, str]:
        """Where each rank is that wrote its stacks at about the same time, by the times of the files."""
        now = self.path.stat().st_mtime
        found = {}
        for path in self.stacks.glob("rank_*.txt"):
            # The limits of the ranks differ a little, as their medians do.
            if path.stat().st_mtime < now - 2 * self.settle - self.floor:
                continue
            heads = re.findall(rf"^{_HEADER}(\d+) .*: in (.*)$", path.read_text(errors="replace"), re.MULTILINE)
            if heads:
                found[int(heads[-1][0])] = heads[-1][1]
        return found

    def _verdict(self, found: dict[int, str], what: str, taken: float, limit: float) -> str:
        by_place: dict[str, list[int]] = {}
        for rank, place in sorted(found.items()):
            by_place.setdefault(place, []).append(rank)
        ranks = "; ".join(f"rank {_ranges(ranks)} in {place}" for place, ranks in by_place.items())
        silent = [rank for rank in range(len(self.names)) if rank not in found]
        if silent:
            ranks += f"; nothing from rank {_ranges(silent)} ({self.names[silent[0]]})"
        return (
            f"watchdog: {what} has taken {taken:.1f} s, more than {limit:.1f} s (train.watchdog_factor="
            f"{self.factor:g}): {ranks}; stacks in {self.stacks}; ending with exit code {EXIT_FAILED}"
        )


_HEADER = "== rank "
_PACKAGE = str(Path(__file__).resolve().parent.parent)


def place_of(frame: FrameType | None) -> str:
    """Where a thread is: its innermost function, and the line of this package that called it."""
    if frame is None:
        return "no Python code"
    innermost = frame.f_code.co_name
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(_PACKAGE):
        ours = ours.f_back
    if ours is None:
        return innermost
    name = Path(ours.f_code.co_filename).relative_to(_PACKAGE).as_posix()
    at = f"{name}:{ours.f_lineno} {ours.f_code.co_name}"
    return at if ours is frame else f"{at} ({innermost})"


def _ranges(ranks: list[int]) -> str:
    """Ranks as ranges: 0-2,5."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1] = [ranges[-1][0], rank]
        else:
            ranges.append([rank])
    return ",".join("-".join(map(str, ends)) for ends in ranges)
