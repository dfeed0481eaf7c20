"""LongBench's records from a local directory or archive in the published layout: data/NAME.jsonl, data/NAME_e.jsonl.

Read line by line, from the archive without unpacking it, so memory does not grow with the benchmark.  Every record
is checked on the way; what is wrong is named with file and line.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.longbench import longbench_metrics
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import Task

_WHERE_FROM = "give LongBench's data.zip or the directory with its data/*.jsonl"


@dataclass(frozen=True)
class Record:
    """One question as published.  `words`: the benchmark's own count (characters in Chinese)."""

    input: str
    context: str
    answers: list[str]
    words: int
    classes: list[str]


class Data:
    """The files of one benchmark directory or archive, by task."""

    def __init__(self, path: Path | str) -> None:
        """Raises InputError if there is nothing of that name or it is no archive."""
        self.path = Path(path)
        self._archive: zipfile.ZipFile | None = None
        if self.path.is_dir():
            return
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file or directory; {_WHERE_FROM}")
        try:
            self._archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: cannot be read as a zip archive ({error}); {_WHERE_FROM}") from None

    def missing(self, tasks: list[Task], extended: bool) -> list[str]:
        """Names of files that should be there and are not."""
        return [_file_name(task, extended) for task in tasks if self._find(_file_name(task, extended)) is None]

    def records(self, task: Task, extended: bool) -> Iterator[Record]:
        """The records of a task in their order.  Raises InputError naming file and line."""
        name = _file_name(task, extended)
        found = self._find(name)
        if found is None:
            raise InputError(f"{self.path}: holds no {name}; {_WHERE_FROM}")
        label = f"{self.path}:{found}" if self._archive else str(self.path / found)
        number = 0
        try:
            with self._open(found) as file:
                for line in file:
                    number += 1
                    if line.strip():
                        yield _record(line, task, f"{label}, line {number}")
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # RuntimeError: encrypted
            raise InputError(f"{label}: cannot be read after line {number} ({error}); get it again") from None
        if number == 0:
            raise InputError(f"{label}: holds no records; get it again")

    def _find(self, name: str) -> str | None:
        for place in (f"data/{name}", name):
            if self._archive is None and (self.path / place).is_file():
                return place
            if self._archive is not None and place in self._archive.NameToInfo:
                return place
        return None

    def _open(self, found: str) -> BinaryIO:
        if self._archive is None:
            return open(self.path / found, "rb")
        return io.BufferedReader(self._archive.open(found))


def _file_name(task: Task, extended: bool) -> str:
    return f"{task.name}_e.jsonl" if extended else f"{task.name}.jsonl"


def _record(line: bytes, task: Task, where: str) -> Record:
    """One line as a record.  Raises InputError beginning with `where`."""
    try:
        value = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{where}: is not JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: should be a JSON object, is {type(value).__name__}")
    for field, kind, wanted in (
        ("input", str, "a text"),
        ("context", str, "a text"),
        ("answers", list, "a list of texts"),
        ("length", int, "a number of words"),
    ):
        if field not in value:
            raise InputError(f'{where}: "{field}" is missing; should be {wanted}')
        if not isinstance(value[field], kind) or isinstance(value[field], bool):
            raise InputError(f'{where}: "{field}" is {_shown(value[field])}; should be {wanted}')
    record = Record(
        input=value["input"],
        context=value["context"],
        answers=[str(answer) if type(answer) is int else answer for answer in value["answers"]],
        words=value["length"],
        classes=value.get("all_classes") or [],
    )
    _check_answers(record, task, where)
    return record


def _check_answers(record: Record, task: Task, where: str) -> None:
    """Raise InputError unless the task's metric can score against the record's answers."""
    if not record.answers or not all(isinstance(answer, str) for answer in record.answers):
        raise InputError(f'{where}: "answers" is {_shown(record.answers)}; should be a list of one text or more')
    if task.metric == "classification":
        classes = record.classes
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise InputError(f'{where}: "all_classes" is {_shown(classes)}; {task.name} needs the list of its classes')
    if task.metric in ("retrieval", "retrieval_zh"):
        chinese = task.metric == "retrieval_zh"
        for answer in record.answers:
            if longbench_metrics.paragraph(answer, chinese) is None:
                wanted = "段落1" if chinese else "Paragraph 1"
                raise InputError(f'{where}: "answers" has {_shown(answer)}; {task.name} needs one such as "{wanted}"')
    for text in (record.input, record.context, *record.answers):
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: holds half a character at {error.start}, which no tokenizer takes") from None


def _shown(value: object) -> str:
    """JSON of a value, cut to what fits into a line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
