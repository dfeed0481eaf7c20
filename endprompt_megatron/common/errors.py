"""Exit codes, and the errors that talk to the person who can mend them.

A tool's `main` runs inside `run_cli`: an `InputError` becomes one line on stderr and exit code 2,
without a traceback; everything unexpected keeps its traceback and exits 1.
"""

import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_RESUMABLE = 75  # stopped early (preemption, time limit); start the same command again


class InputError(Exception):
    """The user's input is wrong.  The message is one line: the key or file, the value, the way out."""


class Unavailable(InputError):
    """What is asked for needs something that this machine has not got; what is asked beside it can go on without."""


class TrainingError(Exception):
    """The run cannot go on and starting it again unchanged will not help.  One line, exit code 1."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and leave the process with the exit code of the contract (module docstring)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        code = main() or EXIT_DONE
    except (InputError, TrainingError, KeyboardInterrupt) as error:
        code = _said(error)
    except BrokenPipeError:
        # `tool | head` is not an error; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    _leave(code)
    sys.exit(code)


def leave_at_once(error: BaseException) -> NoReturn:
    """Say what went wrong and end the process, by the same contract, without any clean-up: that could wait for ever."""
    if isinstance(error, InputError | TrainingError | KeyboardInterrupt):
        code = _said(error)
        _leave(code)
    else:
        traceback.print_exception(error)
        code = EXIT_FAILED
    sys.stderr.flush()
    os._exit(code)


def _said(error: BaseException) -> int:
    """The exit code of an error that talks to a person, who is told."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    _complain(error)
    return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    _leave_code(code)


def _leave_code(code: int) -> None:
    """Write the exit code where a launcher asked for it: torchrun replaces those of its ranks by its own.

    A rank that is killed, or dies with a traceback, leaves none: slurm/node.sh tells it apart by that.
    """
    directory = os.environ.get("ENDPROMPT_EXIT_CODES")
    if directory:
        with open(os.path.join(directory, os.environ.get("LOCAL_RANK", "0")), "w", encoding="ascii") as file:
            file.write(f"{code}\n")


def _complain(error: Exception) -> None:
    """One line on stderr; of the ranks on a node, which all find the same, the first says it."""
    local_rank = next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "0")
    if local_rank == "0":
        print(f"error: {error}", file=sys.stderr)


_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
