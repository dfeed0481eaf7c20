#!/usr/bin/env python3
"""Pack what a machine with GPUs and no network lacks for `make gpu`, in pieces that are easily carried.

    make gpu-kit PYTHON=python3.12 [ARGS="--torch 2.11.0 --there freeze.txt --arch 90"]

PYTHON is the Python of that machine, --torch its torch; --there what `pip freeze` says there, which is left out.  Here
it needs the network and CUDA's toolkit: Transformer Engine's extension for that torch is built, 9 minutes on two
cores.  With --arch, GPU code for other architectures is taken out of its library: 25 MB instead of 270.

Leaves .gpu/kit/kit-000, -001, ... of at most --piece MB and kit.json with their checksum.  Carry the sources, .gpu/kit
included; `make gpu` unpacks it there (python benchmarks/gpu_kit.py --unpack does just that).
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from endprompt_megatron.common.errors import InputError, run_cli  # noqa: E402

GPU = ROOT / ".gpu"
KIT = GPU / "kit"
SITES = ("site", "site-te")
ENGINE = "transformer_engine"
_FAT_BINARY, _FAT_HEADER = 0xBA55ED50, 16
# Torch is there, with the libraries that it brought; the last is 400 MB of kernels for Blackwell.
_LEFT_OUT = ("torch==", "triton==", "cuda-", "nvidia-cu", "nvidia-nccl", "nvidia-nv", "nvidia-cutlass-dsl")
_KEPT = "nvidia-cudnn-frontend"
_ELF = 2  # kind of an entry that is machine code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.11.0", help="version on the machine with GPUs [2.11.0]")
    parser.add_argument("--engine", default="2.18.0", help="Transformer Engine's version [2.18.0]")
    parser.add_argument("--megatron", default="0.19.0", help="Megatron-Core's version [0.19.0]")
    parser.add_argument("--cuda", default="cu13", choices=["cu12", "cu13"], help="of the machine's torch [cu13]")
    parser.add_argument("--there", type=Path, metavar="FILE", help="pip freeze of that machine")
    parser.add_argument("--arch", type=int, metavar="N", help="keep GPU code for this alone, such as 90 for an H100")
    parser.add_argument("--piece", type=int, default=60, metavar="MB", help="size of a piece [60]")
    parser.add_argument("--unpack", action="store_true", help="unpack .gpu/kit here")
    args = parser.parse_args()
    if args.unpack:
        unpack()
        return
    for site in SITES:
        shutil.rmtree(GPU / site, ignore_errors=True)
    install(args)
    if args.arch is not None:
        for library in (GPU / "site-te").rglob("libtransformer_engine.so"):
            keep_architecture(library, args.arch)
    pack(args)


def install(args: argparse.Namespace) -> None:
    """Fill .gpu/site and .gpu/site-te, with the Python that runs this."""
    build = GPU / "build"
    python = build / "bin" / "python"
    if not python.exists():
        call(sys.executable, "-m", "venv", build)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call(*pip, f"torch=={args.torch}", "setuptools<82", "wheel", "ninja", "pybind11", "packaging", "numpy")
    # Transformer Engine's extension is distributed as source: it is built for this torch.
    include = Path(out_of(python, "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1] / 'nvidia')"))
    headers = [str(path) for path in include.glob("*/include")]
    environment = {"CPATH": os.pathsep.join(headers), "NVTE_FRAMEWORK": "pytorch"}
    # At once: pip would not add to a package that is there.
    engine = [f"{ENGINE}{part}=={args.engine}" for part in ("", f"_{args.cuda}", "_torch")]
    into = ["--no-deps", "--no-compile", "--no-build-isolation", "--target", GPU / "site-te"]
    call(*pip, *into, *engine, environment=environment)
    # What they all need, as pip resolves it beside that torch, without what is there.
    needed = [f"megatron-core=={args.megatron}", *requirements(), "pytest", "pytest-xdist", *needs_of_engine(python)]
    there = names_in(args.there)
    report = GPU / "resolved.json"
    call(*pip, "--dry-run", "--ignore-installed", "--report", report, f"torch=={args.torch}", *needed)
    found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    found = {plain(each["name"]): each["version"] for each in found}
    report.unlink()
    chosen = [f"{name}=={version}" for name, version in found.items() if name not in there]
    chosen = [each for each in chosen if each.startswith(_KEPT) or not each.startswith(_LEFT_OUT)]
    call(*pip, "--no-deps", "--no-compile", "--target", GPU / "site", *chosen)


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines]
    return [each for each in wanted if each and not each.startswith(("torch", "megatron-core"))]


def needs_of_engine(python: Path) -> list[str]:
    """Requirements of Transformer Engine's extension that are not torch or itself."""
    code = (
        "import importlib.metadata as m\n"
        f"d, = m.distributions(path=[{str(GPU / 'site-te')!r}], name='{ENGINE}_torch')\n"
        "print('\\n'.join(r for r in d.requires if ';' not in r))"
    )
    return [line for line in out_of(python, code).splitlines() if not line.startswith(("torch", ENGINE))]


def names_in(freeze: Path | None) -> set[str]:
    if freeze is None:
        return set()
    if not freeze.is_file():
        raise InputError(f"--there {freeze}: no such file; write it there with `pip freeze`")
    lines = freeze.read_text().splitlines()
    return {plain(line.partition("==")[0].partition(" @ ")[0]) for line in lines if line.strip()}


def plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def keep_architecture(library: Path, architecture: int) -> None:
    """Overwrite the machine code for other GPUs with zeros: the file keeps its size and packs to a tenth.

    A fat binary is a header (magic u32, version u16, header size u16, size u64) and entries (kind u16, u16, header size
    u32, payload size u64, ..., architecture u32 at byte 28), of which CUDA loads the one for the GPU that is there.
    """
    data = bytearray(library.read_bytes())
    magic, at = struct.pack("<I", _FAT_BINARY), 0
    while (at := data.find(magic, at)) >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, at)
        if (version, header) != (1, _FAT_HEADER) or at + header + size > len(data):
            at += len(magic)
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, length, payload = struct.unpack_from("<HHIQ", data, entry)
            (own,) = struct.unpack_from("<I", data, entry + 28)
            if (kind, own) != (_ELF, architecture):
                data[entry + length : entry + length + payload] = bytes(payload)
            entry += length + payload
        at = end
    library.write_bytes(data)


def pack(args: argparse.Namespace) -> None:
    shutil.rmtree(KIT, ignore_errors=True)
    KIT.mkdir(parents=True)
    whole = GPU / "kit.tar.xz"
    with tarfile.open(whole, "w:xz", preset=6) as archive:
        for site in SITES:
            archive.add(GPU / site, arcname=site)
    data = whole.read_bytes()
    whole.unlink()
    size = args.piece * 10**6
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    for number, piece in enumerate(pieces):
        (KIT / f"kit-{number:03}").write_bytes(piece)
    about = {"pieces": len(pieces), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    about |= {"python": ".".join(map(str, sys.version_info[:2])), "torch": args.torch, "architecture": args.arch}
    (KIT / "kit.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"{KIT}: {len(pieces)} pieces, {len(data) / 1e6:.0f} MB; for Python {about['python']}, torch {args.torch}")


def unpack() -> None:
    """Join the pieces and unpack them into .gpu.  Raises InputError if one is missing, or changed on the way."""
    path = KIT / "kit.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with `make gpu-kit` on a machine with a network")
    about = json.loads(path.read_text())
    python = ".".join(map(str, sys.version_info[:2]))
    if python != about["python"]:
        raise InputError(f"{path}: the kit is for Python {about['python']}, this is {python}")
    missing = [n for n in range(about["pieces"]) if not (KIT / f"kit-{n:03}").is_file()]
    if missing:
        raise InputError(f"{KIT}: kit-{missing[0]:03} of {about['pieces']} pieces is missing")
    data = b"".join((KIT / f"kit-{n:03}").read_bytes() for n in range(about["pieces"]))
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        raise InputError(f"{KIT}: the pieces do not have the checksum in kit.json: carry them again")
    whole, fresh = GPU / "kit.tar.xz", GPU / "unpacked"
    whole.write_bytes(data)
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(whole) as archive:
        archive.extractall(fresh, filter="data")
    for site in reversed(SITES):  # the one that is looked for comes last
        shutil.rmtree(GPU / site, ignore_errors=True)
        (fresh / site).rename(GPU / site)
    shutil.rmtree(fresh)
    whole.unlink()


def call(*command: object, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(list(map(str, command)), env=os.environ | (environment or {}), check=False)
    if done.returncode:
        raise InputError(f"exit code {done.returncode}: {' '.join(map(str, command))[:300]}")


def out_of(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    run_cli(main)
