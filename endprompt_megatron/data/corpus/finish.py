"""The last step of preparing data: the files of a whole dataset get their names.

Several files cannot be renamed at once.  A note (`.finishing.json`) in the staging directory says that all is there
and was being renamed: whoever finds it renames what is left.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, refuse_existing, write_json
from endprompt_megatron.data.answers import MASK
from endprompt_megatron.data.corpus.join import joined_path
from endprompt_megatron.data.corpus.tokenise import TRAIN
from endprompt_megatron.data.indexed import path_of

SUFFIXES = (".bin", ".json", ".idx")  # the index comes last: a dataset without it is refused as incomplete
CHAT_SUFFIXES = (f"{MASK}.bin", f"{MASK}.idx", *SUFFIXES)
_NOTE = ".finishing.json"
_LAST = (_NOTE, ".job.json", ".lock")


def refuse_taken(out: str, outputs: Iterable[str], suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raise InputError if `out` is no prefix, or its files are there and not those of a run that was renaming them."""
    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        raise InputError(f"--out {out}: is a directory; give a prefix such as {path / 'corpus'}")
    if not (path.with_name(f".{path.name}.partial") / _NOTE).exists():
        for output in outputs:
            for suffix in suffixes:
                refuse_existing(path_of(out, output + suffix), "--out")


def finish_moving(staging: Path, out: str, outputs: Iterable[str], suffixes: tuple[str, ...] = SUFFIXES) -> dict | None:
    """The manifest, if an earlier start was renaming and now all is renamed; None if there is work to do.

    Raises InputError if a file is in the way.
    """
    note = staging / _NOTE
    if note.exists():
        pairs = _pairs(staging, out, outputs, suffixes)
        if all(source.exists() or target.exists() for source, target in pairs):
            manifest = read_json(note, "the manifest of a finished dataset")
            _rename(staging, pairs)
            return manifest
        note.unlink()
    refuse_taken(out, outputs, suffixes)
    return None


def move(staging: Path, out: str, manifests: dict[str, dict], suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Write the manifests and let the datasets appear under their names; the staging directory goes."""
    for output, manifest in manifests.items():
        write_json(joined_path(staging, output, ".json"), manifest)
        for suffix in suffixes:
            if suffix.endswith(".idx"):
                with open(joined_path(staging, output, suffix), "rb+") as file:
                    os.fsync(file.fileno())
    write_json(staging / _NOTE, manifests[TRAIN])
    _rename(staging, _pairs(staging, out, manifests, suffixes))


def _pairs(staging: Path, out: str, outputs: Iterable[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    return [
        (joined_path(staging, output, suffix), path_of(out, output + suffix))
        for output in sorted(outputs, reverse=True)
        for suffix in suffixes
    ]


def _rename(staging: Path, pairs: list[tuple[Path, Path]]) -> None:
    for source, target in pairs:
        if source.exists():
            source.rename(target)
    for path in staging.iterdir():
        if path.name not in _LAST:
            path.unlink()
    (staging / _NOTE).unlink()  # after everything that takes time
    shutil.rmtree(staging)
