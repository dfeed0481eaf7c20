#!/usr/bin/env python3
"""Everything that waits for a GPU, in one go: tests/gpu with and without Transformer Engine, then gpu_step.py.

    make gpu [ARGS="--minutes 25 --workers 4 --out .gpu/results"]

For a machine with one GPU or several, with or without a network.  Where benchmarks/gpu_kit.py has packed .gpu/kit, its
packages are used.  A second start goes on where the first was stopped: tests that passed and contenders that were timed
are not run again, unless the package or the machine is another.  Leaves results.json and results.html in --out; exit
code 1 if a test failed.  Without a GPU it is a rehearsal: every test is skipped, and the page says so.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / ".gpu"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(KIT / "site")]

from endprompt_megatron.common.errors import InputError, run_cli  # noqa: E402

# The packages of the kit that the tests with Transformer Engine take, and those without; in the order of the rounds.
SITES = {"with": ["site", "site-te"], "without": ["site"]}


class Clock:
    """What is left of the time, in seconds."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Results:
    """results.json, written after every step.  Other code than it was begun with starts it anew."""

    def __init__(self, out: Path, about: dict) -> None:
        self.path, self.value = out / "results.json", {"about": about, "tests": {}, "benchmarks": {}}
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if before["about"] == about:
                self.value = before
            else:
                shutil.move(self.path, self.path.with_name("results-before.json"))
                for record in out.glob("tests-*.jsonl"):
                    record.unlink()

    def save(self) -> None:
        from gpu_page import page  # of what the kit has, perhaps

        from endprompt_megatron.common.files import write_text

        write_text(self.path, json.dumps(self.value, indent=2) + "\n")
        write_text(self.path.with_suffix(".html"), page(self.value))


def environment(kind: str) -> dict[str, str]:
    """This process's, with the kit's packages, if there are any."""
    sites = [str(KIT / name) for name in SITES[kind] if (KIT / name).is_dir()]
    paths = [*sites, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(command: list, kind: str, seconds: float, **more: str) -> int | None:
    """Its exit code; None if it took longer, and was ended with all that it had started."""
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(kind) | more, start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def about(kind: str) -> dict:
    """The GPUs, the versions, and a checksum of the code."""
    code = (
        "import json, sys, torch; from endprompt_megatron.preflight.node import versions\n"
        "gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
        "found, broken = versions(); print(json.dumps({'gpus': gpus, **found, 'broken': broken}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(kind), capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(
            f"{sys.executable}: {reason}: name a Python that has torch with PYTHON=..., or see make gpu-kit"
        )
    return json.loads(done.stdout.splitlines()[-1])


def run_tests(results: Results, kind: str, workers: int, seconds: float) -> None:
    record = results.path.with_name(f"tests-{kind}.jsonl")
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--no-header", "-rfE"]
    run([*command, *(["-n", workers] if workers > 1 else [])], kind, seconds, GPU_RECORD=str(record))
    lines = record.read_text().splitlines() if record.exists() else []
    results.value["tests"][kind] = {found["test"]: found for found in map(json.loads, lines)}
    results.save()


def run_benchmarks(results: Results, args: argparse.Namespace, clock: Clock) -> None:
    from gpu_contenders import MEGATRON_LM, OURS, TRANSFORMERS

    done, found = results.value["benchmarks"], results.path.with_name("contenders.json")
    wanted = [*OURS, *TRANSFORMERS, *(MEGATRON_LM if args.megatron_lm else [])]
    wanted = [name for name in wanted if not args.only or any(text in name for text in args.only)]
    if not wanted:
        raise InputError(f"--only {' '.join(args.only)}: no contender's name holds that; see gpu_contenders.py")
    missing = [name for name in wanted if "seconds" not in done.get(name, {})]
    if missing and results.value["about"]["gpus"]:
        command = [sys.executable, "benchmarks/gpu_step.py", "--exactly", "--json", found, "--only", *missing]
        for option in ("layers", "micro_batches", "rounds", "megatron_lm"):
            if getattr(args, option) is not None:
                command += [f"--{option.replace('_', '-')}", getattr(args, option)]
        run(command, "with", clock.left)
    timed = json.loads(found.read_text())["results"] if found.exists() else []
    reason = "no time was left" if results.value["about"]["gpus"] else "needs an NVIDIA GPU"
    done |= {name: {"name": name, "error": reason} for name in missing} | {each["name"]: each for each in timed}
    found.unlink(missing_ok=True)
    results.save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="end after so many [25]")
    parser.add_argument("--test-minutes", type=float, help="of them at most so many for either round of tests")
    parser.add_argument("--workers", type=int, default=4, help="tests side by side on the GPU [4]")
    parser.add_argument("--out", type=Path, default=KIT / "results", help="[.gpu/results]")
    parser.add_argument("--skip", nargs="*", default=[], choices=["with", "without", "benchmarks"])
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="TEXT", help="contenders whose names hold one of these"
    )
    parser.add_argument("--layers", type=int, help="see gpu_step.py, as the next three")
    parser.add_argument("--micro-batches", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--megatron-lm", type=Path)
    args = parser.parse_args()
    clock = Clock(args.minutes)
    unpack()
    facts = about("with")
    print(json.dumps(facts, indent=2), flush=True)
    results = Results(args.out, facts)
    for kind in (kind for kind in SITES if kind not in args.skip):
        installed = facts["Transformer Engine"] is not None
        if installed != (kind == "with") and not (KIT / "site-te").is_dir():
            continue  # it is not there, or cannot be taken away
        left = clock.left if args.test_minutes is None else min(clock.left, 60 * args.test_minutes)
        run_tests(results, kind, args.workers, left)
    if "benchmarks" not in args.skip:
        run_benchmarks(results, args, clock)
    results.save()
    outcomes = [each["outcome"] for suite in results.value["tests"].values() for each in suite.values()]
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped")))
    print(f"see {results.path.with_suffix('.html')}")
    return 1 if "failed" in outcomes else 0


def unpack() -> None:
    """The kit's packages, once."""
    if (KIT / "kit" / "kit.json").exists() and not (KIT / "site").is_dir():
        subprocess.run([sys.executable, "benchmarks/gpu_kit.py", "--unpack"], cwd=ROOT, check=True)
        # At once, and not by every process that imports them.
        sites = [KIT / site for site in SITES["with"]]
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", *sites], stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    run_cli(main)
