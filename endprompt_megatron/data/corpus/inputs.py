"""What a corpus is made of: files, directories, globs, a manifest and saved `datasets` become a list of sources.

A source is one file with documents in it.  Sources are in the order of the arguments; those of a glob or a directory
are sorted by name.  chunks.py cuts sources into work, readers.py takes the documents out.
"""

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ARROW = ".arrow"  # the files of a `datasets` saved to disk; never named by themselves
_MANIFEST_KEYS = {"path", "text_field"}


@dataclass(frozen=True)
class Source:
    """One file: `kind` is one of SUFFIXES or ARROW, `text_field` where the text is in a line or row."""

    path: str
    kind: str
    text_field: str
    bytes: int
    changed: int  # time of last change, ns

    def refuse_changed(self) -> None:
        """Raise InputError if the file has changed since it was listed."""
        try:
            state = os.stat(self.path)
        except OSError as error:
            raise InputError(f"{self.path}: disappeared while it was read ({error.strerror})") from None
        if (state.st_size, state.st_mtime_ns) != (self.bytes, self.changed):
            raise InputError(f"{self.path}: changed while it was read; start again when no process writes to it")


def sources_of(inputs: list[str], manifest: str | None, text_field: str) -> list[Source]:
    """All sources, in order.

    `inputs` are files, globs, directories (searched through, hidden names and unknown kinds left out) and `datasets`
    saved to disk; `manifest` names more of them.  Raises InputError for what is missing, unreadable, of unknown
    kind, or named twice.
    """
    found: list[Source] = []
    for name in inputs:
        found += _of(name, "--input", text_field)
    if manifest is not None:
        for where, name, field in _entries(Path(manifest)):
            found += _of(name, where, field or text_field)
    if not found:
        raise InputError("--input: no input is given; give files, directories, or a --manifest")
    known: set[str] = set()
    for source in found:
        real = os.path.realpath(source.path)
        if real in known:
            raise InputError(f"--input {source.path} is given twice; to repeat text, raise its weight in data.train")
        known.add(real)
    return found


def refuse_texts(sources: list[Source]) -> None:
    """Raise InputError for a file that cannot hold conversations."""
    for source in sources:
        if source.kind == ".txt":
            kinds = ", ".join(suffix for suffix in SUFFIXES if suffix != ".txt")
            raise InputError(f"--input {source.path}: a .txt has no turns; --chat reads {kinds} and saved `datasets`")


def _entries(manifest: Path) -> Iterator[tuple[str, str, str | None]]:
    """(file and line, path, text field) of each entry: a path a line, or {"path": ..., "text_field": ...}."""
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--manifest {manifest}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        where = f"{manifest}:{number}:"
        entry: object = {"path": line.strip()}
        if line.lstrip().startswith("{"):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} not JSON ({error})") from None
        elif not line.strip():
            continue
        if unknown := sorted(set(entry) - _MANIFEST_KEYS):
            raise InputError(f"{where} unknown key {unknown[0]!r}; an entry has path and text_field")
        path, field = entry.get("path"), entry.get("text_field")
        if not isinstance(path, str) or not path or not isinstance(field, str | None):
            raise InputError(f'{where} expected {{"path": "FILE", "text_field": "NAME"}}, found {line.strip()[:80]}')
        yield where, str(manifest.parent / path), field


def _of(name: str, where: str, field: str) -> list[Source]:
    """The sources behind one name.  `where` opens the line of an error."""
    path = Path(name)
    if path.is_dir():
        found = list(_within(path, where, field))
        if not found:
            raise InputError(f"{where} {name}: no file in this directory is {', '.join(SUFFIXES)}")
        return found
    if not path.exists() and glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise InputError(f"{where} {name}: no file matches")
        return [source for match in matches for source in _of(match, where, field)]
    if not path.is_file():
        raise InputError(f"{where} {name}: no such file")
    if not kind_of(name):
        raise InputError(f"{where} {name}: unknown kind of file; use {', '.join(SUFFIXES)}")
    return [_source(name, kind_of(name), where, field)]


def _within(directory: Path, where: str, field: str) -> Iterator[Source]:
    if (directory / "dataset_dict.json").is_file():
        for split in read_json(directory / "dataset_dict.json", "a DatasetDict's list of splits").get("splits", []):
            yield from _saved_dataset(directory / split, where, field)
        return
    if (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file():
        yield from _saved_dataset(directory, where, field)
        return
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _within(entry, where, field)
        elif kind_of(entry.name):
            yield _source(str(entry), kind_of(entry.name), where, field)


def _saved_dataset(directory: Path, where: str, field: str) -> Iterator[Source]:
    """The Arrow files of a `datasets.Dataset` after save_to_disk, in the order of its rows."""
    state = read_json(directory / "state.json", "the state of a saved dataset")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
        raise InputError(f"{directory}/state.json: names no data files; save the dataset again with save_to_disk")
    if not files:
        raise InputError(f"{where} {directory}: a saved dataset without rows; leave it out")
    if state.get("_indices_files"):
        raise InputError(
            f"{where} {directory}: its rows are selected by an index file; call flatten_indices() before save_to_disk"
        )
    for file in files:
        yield _source(str(directory / file["filename"]), ARROW, where, field)


def _source(path: str, kind: str, where: str, field: str) -> Source:
    try:
        with open(path, "rb") as opened:
            opened.read(1)
            state = os.fstat(opened.fileno())
    except OSError as error:
        raise InputError(f"{where} {path}: cannot be read ({error.strerror})") from None
    return Source(path, kind, field, state.st_size, state.st_mtime_ns)


def kind_of(name: str) -> str:
    """The suffix of SUFFIXES that the name ends with, "" without one."""
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
