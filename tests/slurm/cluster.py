"""A real Slurm on one host: munged, slurmctld and two slurmd of its own, in a scratch folder, on free ports.

Two nodes of eight pretended GPUs each, so that the batch scripts run as they are.  Only processes that were
started here are ended.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("n1", "n2")
# cred_expire: a requeued job waits until its old credential is over, two minutes by default.
_CONFIG = """
ClusterName=scratch
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/log/slurmctld
SlurmdLogFile={place}/log/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=600
SchedulerParameters=batch_sched_delay=1,sched_interval=2,requeue_delay=1
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]


class Cluster:
    """`start`, then `submit`, `wait`, `state`, ...; `stop` ends what is left."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.processes: dict[str, subprocess.Popen] = {}
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**inherited, "PATH": path, "SLURM_CONF": str(place / "slurm.conf")}

    def start(self) -> None:
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in NODES)):
            (self.place / name).mkdir(parents=True)
        (self.place / "munge").chmod(0o755)
        key = self.place / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = free_ports(3)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 Gres=gpu:8 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        config = _CONFIG.format(place=self.place, port=ports[0], nodes=nodes, user=user)
        (self.place / "slurm.conf").write_text(config)
        for number in range(8):  # Slurm looks whether the devices are there, not what they are
            (self.place / f"gpu{number}").touch()
        (self.place / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.place}/gpu[0-7]\n")
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={self.place}/munge/{file}" for name, file in files.items()]
        self._run("munged", "--foreground", "--force", "--num-threads=2", *options)
        self._until(lambda: (self.place / "munge" / "socket").exists(), "munged")
        self._run("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.states() == dict.fromkeys(NODES, "idle"), "nodes", 60)

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """As if the machine were lost: slurmd and everything that it started, at once."""
        process = self.processes.pop(node)
        for pid in [*descendants(process.pid), *steps_of(node), process.pid]:
            kill(pid)
        process.wait(10)

    def states(self) -> dict[str, str]:
        lines = self.call("sinfo", "-h", "-N", "-o", "%N %t").split()
        return dict(zip(lines[::2], (state.rstrip("*") for state in lines[1::2]), strict=True))

    def call(self, *command: object, **more: str) -> str:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env={**self.environment, **more}, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.strip()}\n{self.logs()}")
        return done.stdout

    def submit(self, *command: object, cwd: Path, **environment: object) -> int:
        """sbatch COMMAND; returns the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, command)],
            capture_output=True,
            text=True,
            env={**self.environment, **{key: str(value) for key, value in environment.items()}},
            cwd=cwd,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {command}: {done.stderr.strip()}")
        return int(done.stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.call("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int, seconds: float = 600) -> dict[str, str]:
        """The job once it is over: COMPLETED, FAILED, ..."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
        self._until(lambda: self.job(job)["JobState"] in over, f"job {job}", seconds)
        return self.job(job)

    def stop(self) -> None:
        for job in self.call("squeue", "-h", "-o", "%A").split() if "slurmctld" in self.processes else []:
            subprocess.run(["scancel", "--signal=KILL", job], env=self.environment, check=False)
        for name in (*NODES, "slurmctld", "munged"):
            process = self.processes.pop(name, None)
            if process is None:
                continue
            strays = descendants(process.pid)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            for pid in strays:
                kill(pid)

    def logs(self, lines: int = 15) -> str:
        found = []
        for path in sorted((self.place / "log").iterdir()):
            found += [f"-- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(found)

    def _run(self, program: str, *options: str, name: str | None = None) -> None:
        log = open(self.place / "log" / f"{name or program}.out", "ab")  # noqa: SIM115
        self.processes[name or program] = subprocess.Popen(
            [program, *options],
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_the_tests,
        )
        log.close()

    def _until(self, condition, what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except RuntimeError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not there after {seconds} s\n{self.logs()}")
            time.sleep(0.2)


def _end_with_the_tests() -> None:
    """Let the kernel end a daemon if the tests are killed: prctl(PR_SET_PDEATHSIG, SIGTERM)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, the deepest last."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def with_environment(needle: str) -> list[int]:
    """Processes that have `needle` (NAME=VALUE) in the environment they were started with."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if needle.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def steps_of(node: str) -> list[int]:
    """The processes of jobs on a node: they do not descend from its slurmd."""
    return with_environment(f"SLURMD_NODENAME={node}")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
