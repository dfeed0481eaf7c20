"""Runs tools in forks of one process that has imported what most of them import: two seconds a call less.

small.run_tool starts it.  A job is a line of JSON on the descriptor that the command line names first; the answers are
lines on the second one: the process's number, and its exit code once it has ended.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import sys
import threading
import traceback

# What tools import from elsewhere; none of it does anything on import that a tool could tell from a first import.
for name in ("numpy", "yaml", "omegaconf", "jinja2", "torch", "safetensors.torch", "tokenizers", "transformers"):
    __import__(name)


def serve(jobs: int, answers: int) -> None:
    """Run one job after the other until the other side closes its end."""
    with open(jobs, encoding="utf-8") as lines, open(answers, "w", encoding="utf-8") as reply:
        gc.freeze()  # what is here is not to be collected again in every child
        for line in lines:
            job = json.loads(line)
            child = os.fork()
            if child == 0:
                os.close(jobs)
                os.close(answers)
                run(**job)
            print(child, file=reply, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=reply, flush=True)


def run(script: str, arguments: list[str], directory: str, out: str, err: str) -> None:
    """Be `python SCRIPT ARGUMENTS`, with what it prints in files, and end."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # as an interpreter ends: threads, what is to be done at exit, what is still to be written
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
