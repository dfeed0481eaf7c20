"""Runs the demo's steps that are not done yet, and prints each command before it runs so that a reader learns the path.

A step leaves a record of its command when it has succeeded.  The same command after the same steps is not run twice,
and a training that was interrupted resumes from its newest checkpoint.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from endprompt_megatron.common.errors import EXIT_DONE, EXIT_RESUMABLE, InputError
from endprompt_megatron.common.files import disk_errors, read_json, write_json
from endprompt_megatron.common.units import format_duration
from endprompt_megatron.convert.linked import with_config
from endprompt_megatron.demo import stages
from endprompt_megatron.demo.stages import ROOT, Knobs, Step


def run(knobs: Knobs, beside: Path | None = None) -> int:
    """Run the steps that are not done yet; returns the exit code: 0, 75 if the training stopped early, or the tool's.

    `beside`: see `stages.steps`.  Raises InputError for knobs that cannot work.
    """
    knobs.check()
    plan = stages.steps(knobs, beside)
    records = Records(knobs)
    started = time.monotonic()
    for number, step in enumerate(plan):
        print(f"\n=== {number + 1}/{len(plan)} {step.title}", flush=True)
        print(f"$ {step.shown}", flush=True)
        key = records.key(plan[: number + 1])
        if not step.always and records.is_done(step, key):
            print(f"(already done: {', '.join(map(str, step.outputs))})", flush=True)
            continue
        records.begin(step, key, plan[number:])
        began = time.monotonic()
        code = execute(step)
        seconds = time.monotonic() - began
        if code == EXIT_RESUMABLE:
            print("demo: the training stopped early with a checkpoint; the same command resumes it", file=sys.stderr)
            return code
        if code != EXIT_DONE:
            print(
                f"demo: step {number + 1} ({step.name}) ended with exit code {code}, see above; "
                "the same command starts again at this step",
                file=sys.stderr,
            )
            return code
        records.finish(step, key)
        print(f"({format_duration(seconds)})", flush=True)
    print(f"\nThe steps of this invocation took {format_duration(time.monotonic() - started)}.", flush=True)
    return EXIT_DONE


def execute(step: Step) -> int:
    """Run the step's command in the repository; its output goes straight to the terminal.  Returns the exit code.

    A step that resumes is stopped as a scheduler would stop it, by SIGTERM, with time to write its checkpoint: it runs
    in a session of its own, since Control-C in a terminal would reach each of its processes.
    """
    # Nothing may be fetched from a hub: all that the demo needs is on disk by now.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **step.environment}
    process = subprocess.Popen(step.argv, cwd=ROOT, env=environment, start_new_session=step.resumes)
    if not step.resumes:
        return process.wait()

    def ask_to_stop(*_: object) -> None:
        print("\ndemo: asking the training to write a checkpoint and stop", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGTERM)

    asked_by = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, ask_to_stop) for number in asked_by}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Records:
    """Which steps have succeeded, by the commands that led to them: small JSON files under demo/steps."""

    def __init__(self, knobs: Knobs) -> None:
        self.shared = ROOT / knobs.directory / "steps"
        self.own = self.shared / knobs.run.name
        self.run = knobs.run

    def path(self, step: Step) -> Path:
        directory = self.own if any(self._in_run(output) for output in step.outputs) else self.shared
        return directory / f"{step.name}.json"

    def _in_run(self, output: Path) -> bool:
        return output == self.run or self.run in output.parents

    @staticmethod
    def key(done: list[Step]) -> str:
        """Checksum of the commands up to and including a step."""
        return hashlib.sha256(json.dumps([step.command for step in done]).encode()).hexdigest()

    def _state(self, step: Step) -> dict:
        try:
            return read_json(self.path(step), "a record of the demo")
        except InputError:
            return {}

    def is_done(self, step: Step, key: str) -> bool:
        state = self._state(step)
        there = all((ROOT / output).exists() for output in step.outputs)
        return there and state.get("key") == key and state.get("done") is True

    def begin(self, step: Step, key: str, following: list[Step]) -> None:
        """Forget this step and those after it, and remove its outputs unless it resumes from them."""
        same = self._state(step).get("key") == key
        if not step.always:
            for later in following:
                self.path(later).unlink(missing_ok=True)
            if not (step.resumes and same):
                for output in step.outputs:
                    remove(ROOT / output)
        with disk_errors(self.path(step).parent, "demo"):
            self.path(step).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path(step), {"key": key, "done": False})

    def finish(self, step: Step, key: str) -> None:
        write_json(self.path(step), {"key": key, "done": True})


def remove(path: Path) -> None:
    """Remove a file or a directory of the demo; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def interpolate(model: Path, like: Path, out: Path) -> None:
    """Write `out`: the weights of `model` (linked, not copied) under the config of `like`, which scales RoPE."""
    with_config(model, (like / "config.json").read_text(encoding="utf-8"), out)
