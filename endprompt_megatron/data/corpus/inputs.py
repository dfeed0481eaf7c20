"""What a corpus is made of: files, directories, globs, a manifest and saved `datasets` become a list of sources.

A source is one file with documents in it.  Sources are in the order of the arguments; those of a glob or a directory
are sorted by name.  chunks.py cuts sources into work, readers.py takes the documents out.
"""

import codecs
import contextlib
import glob
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, refuse_pointer
from endprompt_megatron.data.corpus.decompress import CompressionError, Decompressed

TEXT, LINES, JSON, PARQUET = "text", "JSON lines", "JSON", "parquet"
ARROW = "arrow"  # the files of a `datasets` saved to disk; never named by themselves
# What a file holds, by the ending of its name, in upper or lower case.
_ENDINGS = {
    ".txt": TEXT,
    ".text": TEXT,
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LINES,  # which a .json often is; one array or object is told by how it begins
    ".parquet": PARQUET,
    ".pq": PARQUET,
}
# Endings after those of texts and of JSON.
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
READ = f"{', '.join(_ENDINGS)}; texts and JSON also with {', '.join(_COMPRESSED)} behind it"
# Files that lie beside the data of a `datasets` and hold no documents.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MANIFEST_KEYS = {"path", "text_field"}
_HEAD = 1 << 16


@dataclass(frozen=True)
class Source:
    """One file: `kind` is what it holds, `compression` the name of its compression or "".

    `text_field`: where the text is in a line, record or row.
    """

    path: str
    kind: str
    compression: str
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


def sources_of(inputs: list[str], manifest: str | None, text_field: str) -> tuple[list[Source], list[str]]:
    """All sources, in order, and the files of directories that are left out, since no document is read from such.

    `inputs` are files, globs, directories (searched through, hidden names apart) and `datasets` saved to disk;
    `manifest` names more of them.  Raises InputError for what is missing, unreadable, of unknown kind, or named twice.
    """
    found: list[Source] = []
    left_out: list[str] = []
    for name in inputs:
        found += _of(name, "--input", text_field, left_out)
    if manifest is not None:
        for where, name, field in _entries(Path(manifest)):
            found += _of(name, where, field or text_field, left_out)
    if not found:
        raise InputError("--input: no input is given; give files, directories, or a --manifest")
    known: set[str] = set()
    for source in found:
        real = os.path.realpath(source.path)
        if real in known:
            raise InputError(f"--input {source.path} is given twice; to repeat text, raise its weight in data.train")
        known.add(real)
    return found, left_out


def refuse_texts(sources: list[Source]) -> None:
    """Raise InputError for a file that cannot hold conversations."""
    for source in sources:
        if source.kind == TEXT:
            raise InputError(
                f"--input {source.path}: a text has no turns; --chat reads JSON, Parquet and saved `datasets`"
            )


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


def _of(name: str, where: str, field: str, left_out: list[str]) -> list[Source]:
    """The sources behind one name.  `where` opens the line of an error."""
    path = Path(name)
    if path.is_dir():
        found = list(_within(path, where, field, left_out))
        if not found:
            raise InputError(f"{where} {name}: no file in this directory is {READ}")
        return found
    if not path.exists() and glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            raise InputError(f"{where} {name}: no file matches")
        return [source for match in matches for source in _of(match, where, field, left_out)]
    if not path.is_file():
        raise InputError(f"{where} {name}: no such file")
    if kind_of(name) is None:
        raise InputError(f"{where} {name}: unknown kind of file; use {READ}")
    return [_source(name, where, field)]


def _within(directory: Path, where: str, field: str, left_out: list[str]) -> Iterator[Source]:
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
            yield from _within(entry, where, field, left_out)
        elif kind_of(entry.name) is None or entry.name in _DESCRIPTIONS:
            left_out.append(str(entry))
        else:
            yield _source(str(entry), where, field)


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
        yield _source(str(directory / file["filename"]), where, field, (ARROW, ""))


def _source(path: str, where: str, field: str, known: tuple[str, str] | None = None) -> Source:
    kind, compression = known or kind_of(path)
    refuse_pointer(Path(path))
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if kind == LINES and not _is_lines(_head(file, compression)):
                kind = JSON
            file.read(1)
    except OSError as error:
        raise InputError(f"{where} {path}: cannot be read ({error.strerror or error})") from None
    return Source(path, kind, compression, field, state.st_size, state.st_mtime_ns)


def kind_of(name: str) -> tuple[str, str] | None:
    """What a file of this name holds, and its compression; None for what is not read."""
    stem, name = name.lower(), name.lower()
    compression = ""
    for ending, method in _COMPRESSED.items():
        if name.endswith(ending):
            stem, compression = name.removesuffix(ending), method
    kind = next((kind for ending, kind in _ENDINGS.items() if stem.endswith(ending)), None)
    return None if kind is None or (kind == PARQUET and compression) else (kind, compression)


def _head(file: BinaryIO, compression: str) -> bytes:
    """The first bytes of a file's content; of a broken one what there is, its reader says the rest."""
    if not compression:
        return file.read(_HEAD)
    with contextlib.suppress(CompressionError):
        return io.BufferedReader(Decompressed(file, compression), _HEAD).read(_HEAD)
    return b""


def _is_lines(head: bytes) -> bool:
    """Whether JSON that begins so has a record a line, and is not one array, or one object over several lines."""
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    first, _, rest = head.partition(b"\n")
    if head[:1] not in (b"[", b"{") or (head[:1] == b"{" and not rest.strip()):
        return True
    try:
        orjson.loads(first)
    except ValueError:
        # An array begins on its first line; an object that ends on a later one has nothing but its beginning there.
        return head[:1] == b"{" and first.strip() != b"{"
    return head[:1] == b"{" or bool(rest.strip())
