"""How the ranks of a preflight exchange small messages: through a TCP store, and rank 0 collects them.

Not a process group: preflight must find out when one cannot be built, and still report the other checks.  A
rank that does not arrive is named, and the rest continues.  A single process exchanges messages with itself.
"""

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.distributed.runtime import Launch

_ROUNDS = 3  # of measuring clocks; the fastest delivery counts


def node_name() -> str:
    """This node's name: Slurm's, which tells several slurmd on one host apart, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Meeting:
    """The ranks that take part, and their messages.

    `nodes` maps each rank that takes part to its node, and `leaders` each node to its lowest rank.  `absent` lists
    the ranks that did not arrive, `refused` maps ranks that cannot take part to their node and the reason.
    `key` is unique to this preflight.
    """

    def __init__(self, launch: Launch, problem: str | None, seconds: float) -> None:
        """Wait up to `seconds` for all ranks.  `problem`: why this rank cannot take part, which rank 0 reports.

        Raises InputError if the rendezvous cannot be reached or has started without this rank.
        """
        self.rank, self.world_size, self.seconds = launch.rank, launch.world_size, seconds
        self.node = node_name()
        self._store = connect(launch, seconds) if launch.world_size > 1 else _Alone()
        self.post("here", {"node": self.node, "problem": problem})
        if self.rank == 0:
            here = self.gather("here", range(self.world_size))
            fine = {rank: came["node"] for rank, came in here.items() if came["problem"] is None}
            refused = {rank: [came["node"], came["problem"]] for rank, came in here.items() if rank not in fine}
            self.tell("roster", {"key": f"{time.time_ns():x}", "fine": fine, "refused": refused})
        # Rank 0 may itself arrive up to `seconds` late and then wait.
        roster = self.hear("roster", 2 * seconds + 5)
        self.key: str = roster["key"]
        self.nodes: dict[int, str] = {int(rank): node for rank, node in roster["fine"].items()}
        self.refused: dict[int, list[str]] = {int(rank): answer for rank, answer in roster["refused"].items()}
        self.absent = [r for r in range(self.world_size) if r not in self.nodes and r not in self.refused]
        self.leaders: dict[str, int] = {}
        for rank, node in sorted(self.nodes.items()):
            self.leaders.setdefault(node, rank)
        if self.rank in self.absent:
            raise InputError(f"rank {self.rank} on {self.node} arrived after preflight had started without it")

    @property
    def all_present(self) -> bool:
        """Whether every rank takes part."""
        return len(self.nodes) == self.world_size

    @property
    def is_leader(self) -> bool:
        """Whether this rank collects the facts of its node."""
        return self.leaders.get(self.node) == self.rank

    def post(self, name: str, value: Any) -> None:
        """Leave a message for rank 0."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def gather(self, name: str, ranks: Any, seconds: float | None = None) -> dict[int, Any]:
        """Messages of `ranks` by rank; those that do not arrive in time are left out."""
        keys = {rank: f"{name}/{rank}" for rank in ranks}
        try:
            self._store.wait(list(keys.values()), timedelta(seconds=seconds or self.seconds))
            come = keys
        except RuntimeError:  # torch's error for a timeout
            come = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: json.loads(self._store.get(key)) for rank, key in come.items()}

    def tell(self, name: str, value: Any) -> None:
        """Send a message from rank 0 to all."""
        self._store.set(name, json.dumps(value))

    def hear(self, name: str, seconds: float | None = None) -> Any:
        """The message that rank 0 sent to all.  Raises InputError if none arrives."""
        try:
            self._store.wait([name], timedelta(seconds=seconds or self.seconds))
            return json.loads(self._store.get(name))
        except RuntimeError:
            raise InputError(f"rank {self.rank} on {self.node}: rank 0 ended or did not answer ({name})") from None

    def clock_offsets(self) -> dict[str, float]:
        """Seconds by which each node's clock is ahead of rank 0's.  Leaders call; only rank 0 gets the result.

        All wait for one message and read their clocks when it arrives.  The delivery only adds time, so the
        minimum of a few rounds is the best estimate.
        """
        offsets = []
        for number in range(_ROUNDS):
            self.post(f"ready-{number}", None)
            if self.rank == 0:
                self.gather(f"ready-{number}", self.leaders.values())
                self.tell(f"clock-{number}", _now())
            offsets.append(-self.hear(f"clock-{number}") + _now())
        self.post("offset", min(offsets))
        if self.rank:
            return {}
        return {self.nodes[rank]: value for rank, value in self.gather("offset", self.leaders.values()).items()}

    def leave(self) -> None:
        """The last call of every rank: rank 0, which may host the store, waits until the others have left."""
        self.post("left", None)
        if self.rank == 0:
            self.gather("left", self.nodes, seconds=min(10.0, self.seconds))


def connect(launch: Launch, seconds: float, *, serve: bool = True) -> Any:
    """A connection to the store at MASTER_ADDR:MASTER_PORT, which rank 0 hosts unless torchrun does.

    `serve=False`: a further connection to a store that exists.  Raises InputError, with the address.
    """
    import torch.distributed as dist

    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT")
    if port is None or not port.isdigit():
        problem = "is not set" if port is None else f"={port} is not a number"
        raise InputError(f"MASTER_PORT {problem}: start with torchrun, or export MASTER_ADDR and MASTER_PORT")
    serves = serve and launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    who = f"rank {launch.rank} on {node_name()}: the rendezvous at {address}:{port} (MASTER_ADDR, MASTER_PORT)"
    refusal = None if serves else _refusal(address, int(port), seconds)
    if refusal:
        raise InputError(
            f"{who} cannot be reached within {seconds:g} s ({refusal}); check that rank 0 runs and that the "
            "port is open between nodes"
        )
    try:
        store = dist.TCPStore(
            address, int(port), is_master=serves, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:150]
        raise InputError(f"{who} {'cannot be opened' if serves else 'does not answer'} ({reason})") from None
    # torchrun's store outlives a restart.
    return dist.PrefixStore(f"preflight-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _refusal(address: str, port: int, seconds: float) -> str | None:
    """Why no connection could be made within `seconds`; None if one could."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
            return None
        except OSError as error:
            reason = (error.strerror or str(error) or type(error).__name__).lower()
        if time.monotonic() > deadline - 0.1:
            return reason
        time.sleep(0.1)


def _now() -> float:
    return time.time()


class _Alone:
    """A store for one process: a message has been set, or will never be."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> str:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], _timeout: timedelta) -> None:
        if not self.check(keys):
            raise RuntimeError("no other process can answer")
