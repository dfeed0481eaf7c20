"""Start several processes of a tool on one machine, without torchrun: signals and exit codes pass through.

For laptops and tests.  On a cluster srun and torchrun do this, but they replace a child's exit code (2, 75) by
their own; therefore the demo does not use them.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from endprompt_megatron.common.errors import EXIT_INPUT, EXIT_RESUMABLE

_GRACE_SECONDS = 30.0


def spawn(argv: list[str], processes: int) -> int:
    """Run `python argv...` in `processes` ranks; returns the most serious exit code (2, then 1, then 75, then 0).

    SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are forwarded.  When a rank fails the others are stopped, since they
    would wait for it forever.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    children: list[subprocess.Popen] = []
    received = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, forward)
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
        }
        if received:
            break  # a signal arrived before all had started; those that have started received it
        children.append(subprocess.Popen([sys.executable, *argv], env=environment))
    while any(child.poll() is None for child in children):
        if any(child.poll() not in (None, 0, EXIT_RESUMABLE) for child in children):
            _stop(children)
        time.sleep(0.1)
    codes = {child.returncode for child in children}
    if EXIT_INPUT in codes:
        return EXIT_INPUT
    failed = codes - {0, EXIT_RESUMABLE}
    if failed:
        return next((code for code in failed if code > 0), 1)
    return EXIT_RESUMABLE if EXIT_RESUMABLE in codes else 0


def _stop(children: list[subprocess.Popen]) -> None:
    """Let ranks that fail for the same reason finish reporting it, then end those that wait for a lost rank."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.05)
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait(_GRACE_SECONDS)
