"""Nothing half-written: outputs grow under a temporary name and are renamed when they are complete."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from endprompt_megatron.common.direct_io import crc32
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.file_lock import lock_file


def refuse_existing(out: Path, flag: str) -> None:
    """Raise InputError if `out` is already there (an empty directory is fine).  `flag` names the option."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise InputError(f"{flag} {out}: already exists; remove it or choose another name")


@contextlib.contextmanager
def staged_directory(out: Path, flag: str = "--out") -> Iterator[Path]:
    """Yield a fresh temporary directory beside `out`; rename it to `out` if the block succeeds.

    On any failure, KeyboardInterrupt included, the temporary directory is removed.  Raises InputError
    if `out` exists and is not empty, if its parent cannot be written, and for a full disk.
    """
    refuse_existing(out, flag)
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with disk_errors(out, flag):
            staging.mkdir(parents=True)
            yield staging
            if out.is_dir():
                out.rmdir()
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(out: Path, flag: str) -> Iterator[None]:
    """Turn the operating system's refusals to write `out` (disk full, no permission) into InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{flag} {out}: no space left on the disk; free some or choose another place") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise InputError(
                f"{flag} {out}: cannot be written ({error.strerror.lower()}); choose another place"
            ) from error
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A binary file that takes the place of `path` in one step as seen by any reader: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """`write_text` of `value` as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file that is not UTF-8, as Python holds it
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def refuse_pointer(path: Path) -> None:
    """Raise InputError for a file that a clone without git-lfs left in the place of a large one."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise InputError(
                f"{path}: a pointer of Git LFS, not the file itself; run `git lfs pull` there, or download it again"
            )


_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: Path, what: str) -> dict:
    """Read a JSON object.  Raises InputError naming `what` and the path if it is missing or broken."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {what}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as {what} ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected {what}, a JSON object, found {type(value).__name__}")
    return value


def digest_of_some(path: Path, blocks: int = 64) -> str:
    """SHA-256 of `blocks` blocks of 4 KiB of a file that may be too large to read, from its beginning to its end."""
    digest, size, block = hashlib.sha256(), path.stat().st_size, 4096
    with open(path, "rb") as file:
        for number in range(blocks):
            file.seek(max(size - block, 0) * number // (blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


def checksums_of(directory: Path, known: list[dict]) -> dict[str, dict]:
    """Bytes and CRC-32 of every file below `directory`; those of `known` (file, bytes, crc32) are not read again."""
    files = {report["file"]: {"bytes": report["bytes"], "crc32": report["crc32"]} for report in known}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files:
            files[name] = {"bytes": path.stat().st_size, "crc32": crc32(path)}
    return files


@contextlib.contextmanager
def resumable_directory(out: Path, job: dict, flag: str = "--out") -> Iterator[Path]:
    """Yield `.OUT.partial` beside `out`; rename it to `out` if the block succeeds.

    Raises InputError as staged_directory does, and as locked_staging.
    """
    refuse_existing(out, flag)
    with locked_staging(out, job, flag) as staging:
        refuse_existing(out, flag)  # it may have been finished a moment ago
        yield staging
        for hidden in staging.glob(".*"):
            hidden.unlink()
        if out.is_dir():
            out.rmdir()
        staging.rename(out)


@contextlib.contextmanager
def locked_staging(out: Path, job: dict, flag: str = "--out") -> Iterator[Path]:
    """Yield `.OUT.partial` beside `out`, held by this process alone.

    What a run of the same `job` (JSON) left there when it was killed or interrupted is still there; anything else
    is removed first, and so is everything if the block raises an error.  Raises InputError for a full disk and the
    like, and if another process is writing `out`.
    """
    staging = out.with_name(f".{out.name}.partial")
    with disk_errors(out, flag):
        descriptor = _locked(staging, out, flag)
    try:
        try:
            with disk_errors(out, flag):
                _keep_only(staging, job)
                yield staging
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _locked(staging: Path, out: Path, flag: str) -> int:
    """A descriptor of the directory's lock, which is ours."""
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_file(descriptor):
                raise InputError(f"{flag} {out}: another process is writing it; wait for it, or choose another name")
            with contextlib.suppress(FileNotFoundError):
                # Who held it before may have removed the directory since it was opened here.
                if os.path.samestat(os.fstat(descriptor), os.stat(staging / ".lock")):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _keep_only(staging: Path, job: dict) -> None:
    """Empty the directory unless it belongs to `job`."""
    job = json.loads(json.dumps(job))
    record = staging / ".job.json"
    with contextlib.suppress(InputError):
        if read_json(record, "what is being written") == job:
            return
    for entry in staging.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
    write_json(record, job)
