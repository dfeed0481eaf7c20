"""The directory of an evaluation while it grows: every answer is in it as soon as it is given.

    OUT/evaluation.json              which models, engine and dtype the answers are from
    OUT/answers/LABEL.I-of-N.jsonl   a line for each answered request, by the one process that does part I of N
    OUT/asked/LABEL.I-of-N.jsonl     the requests of a part, in order; appears when all of them are answered
    OUT/results.json                 appears when the last part is complete, or with --merge

A line is keyed by a digest of the model's fingerprint and the whole input: an answer to another prompt, or of another
model, is never taken for this one's.  A line that a kill cut short is no line, and its request is asked again.
"""

import contextlib
import heapq
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.file_lock import lock_file
from endprompt_megatron.common.files import disk_errors, read_json, write_json, write_text
from endprompt_megatron.evaluate.requests import Request, Response
from endprompt_megatron.evaluate.split import Part

STATE = "evaluation.json"
_FLAG = "--out"


def refuse_foreign(out: Path) -> None:
    """Raise InputError if `out` is something else than an evaluation, or an empty directory."""
    try:
        others = any(not path.name.startswith(f".{STATE}.") for path in out.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        others = True
    # Looked for last: another part may be making the directory just now, and makes the state before all else.
    if others and not (out / STATE).exists():
        raise InputError(f"{_FLAG} {out}: already exists and holds no evaluation; remove it or choose another name")


def open_state(out: Path, identity: dict, *, write: bool) -> None:
    """Raise InputError unless `out` is new or holds answers of the same identity; with `write`, make it so.

    `identity`: {"engine", "dtype", "models": {label: fingerprint}}.
    """
    path = out / STATE
    refuse_foreign(out)
    if path.exists():
        held = read_json(path, "the state of an evaluation")
        _refuse_other(out, held, identity)
        identity = {**identity, "models": {**held["models"], **identity["models"]}}
    if write:
        with disk_errors(out, _FLAG):
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": 1, **identity})
            for name in ("answers", "asked"):
                (out / name).mkdir(exist_ok=True)


def _refuse_other(out: Path, held: dict, identity: dict) -> None:
    for key in ("engine", "dtype"):
        if held.get(key) != identity[key]:
            raise InputError(
                f"{_FLAG} {out}: holds answers given with --{key} {held.get(key)}, this is --{key} {identity[key]}; "
                "choose another --out"
            )
    for label, fingerprint in identity["models"].items():
        if held["models"].get(label, fingerprint) != fingerprint:
            raise InputError(
                f"{_FLAG} {out}: holds answers of another {label} model, or of this one before its weights changed; "
                "choose another --out, or remove it"
            )


class Answers:
    """The answers of one model: all that are there, and a file to append to."""

    def __init__(self, out: Path, label: str, part: Part) -> None:
        """Read what is there.  Raises InputError if another process does the same part."""
        self.directory, self.label, self.part, self.out = out / "answers", label, part, out
        self.places: dict[str, tuple[Path, int]] = {}  # key -> where its line begins
        self.file: IO[bytes] | None = None
        for path in sorted(self.directory.glob(f"{label}.*.jsonl")):
            self._index(path)

    def _index(self, path: Path) -> None:
        start = 0
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    if line.endswith(b"\n"):
                        self.places[json.loads(line)["key"]] = (path, start)
                start += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def stored(self, key: str) -> tuple[dict, float]:
        """The record of an answer that is there, and the seconds it took."""
        path, start = self.places[key]
        with open(path, "rb") as file:
            file.seek(start)
            line = json.loads(file.readline())
            return line["record"], line["seconds"]

    def add(self, key: str, request: Request, record: dict, seconds: float) -> None:
        """Append a line.  It outlives this process, however that ends.  Raises InputError for a full disk."""
        with disk_errors(self.out, _FLAG):
            if self.file is None:
                self.file = self._open()
            start = self.file.tell()
            # What the answer is to stands in clear beside the key, for whoever reads the file.
            line = {"key": key, **request.name(), "seconds": round(seconds, 3), "record": record}
            self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
        self.places[key] = (Path(self.file.name), start)

    def _open(self) -> IO[bytes]:
        path = self.directory / f"{self.label}.{self.part}.jsonl"
        file = open(path, "a+b")  # noqa: SIM115  (closed by close)
        if not lock_file(file):
            file.close()
            raise InputError(f"{_FLAG} {self.out}: another process does part {self.part} of it; wait for it")
        _cut_after_last_line(file)
        return file

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _cut_after_last_line(file: IO[bytes]) -> None:
    """Remove the beginning of a line that a kill left at the end, and stand there."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65536)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    file.truncate(end)
    file.seek(0, os.SEEK_END)


def write_asked(out: Path, label: str, part: Part, job: str, asked: list[tuple[int, str, Request]]) -> None:
    """Declare a part complete: its requests, each with its place among all parts' and its key, are all answered.

    `job` tells apart what was asked for: settings, text, model.
    """
    lines = [{"job": job}, *(_asked_line(*each) for each in asked)]
    with disk_errors(out, _FLAG):
        path = _asked_path(out, label, part)
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _asked_line(place: int, key: str, request: Request) -> dict:
    return {"at": place, "key": key, **request.name(), "notes": request.notes}


def _asked_path(out: Path, label: str, part: Part) -> Path:
    return out / "asked" / f"{label}.{part}.jsonl"


def is_complete(out: Path, label: str, part: Part, job: str) -> bool:
    """Whether a part has answered all that this job asks."""
    try:
        with open(_asked_path(out, label, part), encoding="utf-8") as file:
            return json.loads(file.readline())["job"] == job
    except (OSError, ValueError, KeyError):
        return False


def complete_count(out: Path, label: str, job: str) -> int | None:
    """A number of parts of which every one is complete; None if there is none."""
    for count in _counts(out, label):
        if all(is_complete(out, label, Part(index, count), job) for index in range(count)):
            return count
    return None


def what_is_missing(out: Path, label: str, job: str) -> str:
    """In words, for where `complete_count` finds none: which part to run."""
    for count in reversed(_counts(out, label)):
        missing = [index for index in range(count) if not is_complete(out, label, Part(index, count), job)]
        if len(missing) < count:
            first = f"{missing[0]}/{count}"
            return f"{out}: {len(missing)} of {count} parts of {label} are not complete; run --part {first} again"
    return f"{out}: nothing was asked of the {label} model with these settings; run it without --merge first"


def _counts(out: Path, label: str) -> list[int]:
    """Numbers of parts that were ever asked, ascending."""
    found = (re.fullmatch(rf"{label}\.\d+-of-(\d+)\.jsonl", path.name) for path in (out / "asked").glob("*.jsonl"))
    return sorted({int(match[1]) for match in found if match})


def responses(out: Path, label: str, count: int) -> Iterator[tuple[Response, float]]:
    """Every response and the seconds it took, in the order of asking, from `count` complete parts.

    Raises InputError if an answer has gone.
    """
    stored = Answers(out, label, Part())
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(_asked_path(out, label, Part(index, count)), encoding="utf-8"))
            for index in range(count)
        ]
        for file in files:
            file.readline()
        for line in heapq.merge(*(map(json.loads, file) for file in files), key=lambda line: line["at"]):
            if line["key"] not in stored:
                raise InputError(
                    f"{_FLAG} {out}: the answer to {line['suite']} {line['task']} {line['length']} {line['number']} "
                    "has gone from answers/; remove asked/ and run it again"
                )
            record, seconds = stored.stored(line["key"])
            name = {key: line[key] for key in ("suite", "task", "length", "number", "notes")}
            yield Response(**name, record=record), seconds
