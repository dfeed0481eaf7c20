"""Hugging Face weights beside checkpoints: RUN/exports/iter_0000100, made while training goes on.

A process of its own makes them of the files of a checkpoint, a few rows at a time, so no rank holds the model twice and
none waits.  What is done stands on the disk alone: a run that was killed makes what lacks when it goes on.
"""

import os
import subprocess
import sys
from pathlib import Path

from endprompt_megatron.checkpoint.layout import complete_iterations, iteration_dir
from endprompt_megatron.distributed.runtime import is_rank_zero, print_rank_zero

EXPORTS = "exports"
# One process, whatever started this rank; and it is to leave the GPUs alone.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "OMPI_", "PMI", "MPI_", "SLURM_", "CUDA_")
_NICENESS = 10


def pending(checkpoints: Path, every: int) -> list[int]:
    """Complete iterations under RUN/checkpoints that are multiples of `every` and not exported yet; [] for 0."""
    if not every:
        return []
    exports = checkpoints.parent / EXPORTS
    return [
        number
        for number in complete_iterations(checkpoints)
        if number and number % every == 0 and not iteration_dir(exports, number).exists()
    ]


class Exports:
    """The exports of a run, made one after the other.  Only the first rank has any; the others' calls do nothing."""

    def __init__(self, checkpoints: Path, every: int) -> None:
        self.checkpoints, self.every = checkpoints, every if is_rank_zero() else 0
        self._process: subprocess.Popen | None = None
        self._failed: set[int] = set()
        self._number = 0

    def go_on(self) -> bool:
        """Begin with the next export, unless one is being made; returns whether one is."""
        if self._process is not None:
            if self._process.poll() is None:
                return True
            if self._process.returncode:
                self._failed.add(self._number)
                print_rank_zero(f"the export of step {self._number} failed: see {self._log()}; training goes on")
            self._process = None
        due = self.due()
        if not due:
            return False
        self._number = due[0]
        self._log().parent.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", __spec__.name, str(self.checkpoints), str(self._number)]
        with open(self._log(), "ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        return True

    def due(self) -> list[int]:
        """Iterations that are still to be exported; one whose export failed in this run is tried by the next."""
        return [number for number in pending(self.checkpoints, self.every) if number not in self._failed]

    def finish(self) -> None:
        """Make all exports that lack."""
        while self.go_on():
            self._process.wait()

    def _log(self) -> Path:
        return self.checkpoints.parent / EXPORTS / f"iter_{self._number:07d}.log"


def main() -> None:
    from endprompt_megatron.convert.to_hf import convert_megatron_to_hf

    os.nice(_NICENESS)
    checkpoints, number = Path(sys.argv[1]), int(sys.argv[2])
    out = iteration_dir(checkpoints.parent / EXPORTS, number)
    print(convert_megatron_to_hf(iteration_dir(checkpoints, number), out, workers=1), flush=True)


if __name__ == "__main__":
    from endprompt_megatron.common.errors import run_cli

    run_cli(main)
