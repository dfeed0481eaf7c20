#!/usr/bin/env python3
"""tools/prepare_data.py against Megatron-LM's tools/preprocess_data.py: tokens a second and memory.

    python benchmarks/prepare_data.py --dir SCRATCH --megatron-lm DIR [--megatron-python PYTHON] [--size 200M]
        [--workers 1 2] [--rounds 3] [--tokenizer llama-3 mistral HF_DIR] [--memory-size 2G] [--json OUT]

DIR is a checkout of Megatron-LM, run as it is; PYTHON one that has what it imports (default: this one).  Both tools
read the same .jsonl with the same tokenizer, in turn, and begin and end a document alike, so that what they write can
be compared.  Seconds are those of the whole command, its start included.  Memory is anonymous memory (pages of files
are the kernel's to drop), sampled 20 times a second: the most that one process below the command had, and the most of
all together.  --memory-size prepares a file of that size with each number of workers, for the memory alone.

The text is documentation, of Debian's python3.11-doc and perl-doc (`apt-get download` gets them; 20 MB in 703
documents), repeated in an ever new order to the size.  The tokenizers come out of Python packages with pip.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PACKAGES = ("python3.11-doc", "perl-doc")
SUFFIXES = (".rst.txt", ".pod")
OURS, THEIRS = "prepare_data.py", "Megatron-LM"


def documents(place: Path) -> list[str]:
    """The texts of the Debian packages, in a fixed order; downloaded once."""
    unpacked = place / "packages"
    if not unpacked.is_dir():
        downloads = place / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=downloads, check=True)
        for package in downloads.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, unpacked], check=True)
    files = sorted(path for path in unpacked.rglob("*") if path.name.endswith(SUFFIXES) and not path.is_symlink())
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def write_jsonl(path: Path, texts: list[str], size: int) -> None:
    """Lines of {"text": ...} of `size` bytes or little more; each round through the texts is in another order."""
    if path.is_file() and path.stat().st_size >= size:
        return
    generator, left = random.Random(0), size
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            for text in generator.sample(texts, len(texts)):
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                left -= len(line.encode())
                file.write(line)
                if left <= 0:
                    break


def tokenizer_directory(name: str, place: Path) -> Path:
    """A Hugging Face directory: LLaMA-3's or Mistral's tokenizer out of a Python package, or the user's own."""
    from tokenizer_files import (
        LLAMA_3,
        MISTRAL,
        SENTENCE_PIECE,
        llama_3_as_hugging_face,
        llama_3_reference,
        sentence_piece_as_hugging_face,
        take,
    )

    if name not in ("llama-3", "mistral"):
        return Path(name)
    directory = place / name
    if directory.is_dir():
        return directory
    if name == "llama-3":
        special = llama_3_reference(place / "wheels").special_tokens
        return llama_3_as_hugging_face(place / "wheels" / LLAMA_3, directory, sorted(special, key=special.get))
    take(MISTRAL, place / "wheels", SENTENCE_PIECE[32000])
    return sentence_piece_as_hugging_face(place / "wheels" / SENTENCE_PIECE[32000], directory)


def command_of(tool: str, source: Path, tokenizer: Path, out: Path, workers: int, options: argparse.Namespace) -> list:
    if tool == OURS:
        script = [sys.executable, ROOT / "tools/prepare_data.py", "--input", source, "--tokenizer", tokenizer]
        return [*script, "--out", out, "--workers", workers]
    script = [options.megatron_python, "-W", "ignore", options.megatron_lm / "tools/preprocess_data.py"]
    what = ["--input", source, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    flags = [options.special_flag] if options.special_flag else []
    return [*script, *what, *flags, "--append-eod", "--output-prefix", out, "--workers", workers]


def measured(command: list, environment: dict[str, str]) -> dict:
    """Run a command: seconds, the most anonymous bytes of one process below it, and of all together."""
    import psutil

    highest: dict[int, int] = {}
    together = 0
    log = Path(environment["BENCHMARK_LOG"])
    began = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=environment)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            now = {}
            with contextlib.suppress(psutil.Error):
                for other in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(OSError, IndexError):  # ended meanwhile
                        status = Path(f"/proc/{other.pid}/status").read_text()
                        now[other.pid] = 1024 * int(status.split("RssAnon:")[1].split()[0])
            highest = {pid: max(highest.get(pid, 0), now.get(pid, 0)) for pid in highest | now}
            together = max(together, sum(now.values()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    below = [count for pid, count in highest.items() if pid != process.pid]
    return {"seconds": seconds, "worker": max(below, default=highest[process.pid]), "together": together}


def written(tool: str, out: Path) -> Path:
    return Path(f"{out}.bin" if tool == OURS else f"{out}_text_document.bin")


def compare(outs: dict[str, Path], bos: int | None) -> dict:
    """Documents and tokens of each tool's dataset, and how many documents have the same tokens in both."""
    import numpy as np

    from endprompt_megatron.data.indexed import read_idx

    said, streams = {}, {}
    for tool, out in outs.items():
        prefix = str(written(tool, out)).removesuffix(".bin")
        index = read_idx(prefix)
        tokens = np.fromfile(f"{prefix}.bin", dtype=index.dtype)
        streams[tool] = np.split(tokens, np.cumsum(index.lengths)[:-1])
        said[tool] = {"documents": len(index.lengths), "tokens": len(tokens)}
    if len(outs) == 2:
        # Versions that do not put BOS before a document are compared without.
        plain = {tool: [_without(document, bos) for document in stream] for tool, stream in streams.items()}
        said["same"] = sum(np.array_equal(*pair) for pair in zip(plain[OURS], plain[THEIRS], strict=True))
    return said


def _without(document, bos: int | None):
    return document[1:] if bos is not None and len(document) and document[0] == bos else document


def run(name: str, place: Path, source: Path, options: argparse.Namespace) -> dict:
    """All rounds of one tokenizer; prints its table."""
    from endprompt_megatron.tokenizer import load_tokenizer

    tokenizer = tokenizer_directory(name, place)
    tools = [OURS] + ([THEIRS] if options.megatron_lm else [])
    environment = os.environ | {"BENCHMARK_LOG": str(place / "log.txt"), "TOKENIZERS_PARALLELISM": "false"}
    theirs = environment | {"PYTHONPATH": str(options.megatron_lm)}
    results: dict[str, list[dict]] = {}
    said = {}
    for _ in range(options.rounds):
        for workers in options.workers:
            outs = {}
            for tool in tools:
                out = place / f"out-{tool.split('.')[0]}"
                for file in place.glob(f"{out.name}*"):
                    file.unlink()
                command = command_of(tool, source, tokenizer, out, workers, options)
                result = measured(command, environment if tool == OURS else theirs)
                results.setdefault(f"{tool}, {workers}", []).append(result)
                outs[tool] = out
            said = said or compare(outs, load_tokenizer(tokenizer).bos_id)
    for workers in options.workers:
        for tool in tools:
            runs = results[f"{tool}, {workers}"]
            speed = statistics.median(said[tool]["tokens"] / run["seconds"] for run in runs)
            pairs = (
                zip(results[f"{THEIRS}, {workers}"], results[f"{OURS}, {workers}"], strict=True)
                if said.get("same") is not None
                else []
            )
            ratios = [slow["seconds"] / fast["seconds"] for slow, fast in pairs] if tool == OURS else []
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
            print(
                f"| {name} | {tool} | {workers} | {statistics.median(run['seconds'] for run in runs):.1f} "
                f"| {speed:,.0f} | {ratio} | {max(run['worker'] for run in runs) / 2**20:.0f} "
                f"| {max(run['together'] for run in runs) / 2**20:.0f} |",
                flush=True,
            )
    print(f"{name}: {json.dumps(said)}", file=sys.stderr)
    return {"runs": results, **said}


def memory(place: Path, texts: list[str], options: argparse.Namespace) -> list[dict]:
    """Prepare one large file with each number of workers, and print what it took."""
    source = place / "large.jsonl"
    write_jsonl(source, texts, options.memory_size)
    tokenizer = tokenizer_directory(options.tokenizer[0], place)
    environment = os.environ | {"BENCHMARK_LOG": str(place / "log.txt")}
    results = []
    for workers in options.workers:
        out = place / "out-large"
        for file in place.glob(f"{out.name}*"):
            file.unlink()
        result = measured(command_of(OURS, source, tokenizer, out, workers, options), environment)
        results.append({"workers": workers, **result})
        print(
            f"{source.stat().st_size / 1e9:.2f} GB, {workers} worker(s): {result['seconds']:.0f} s, "
            f"{result['worker'] / 2**20:.0f} MiB a worker, {result['together'] / 2**20:.0f} MiB together",
            flush=True,
        )
    return results


def size(text: str) -> int:
    units = {"K": 10**3, "M": 10**6, "G": 10**9}
    return int(float(text[:-1]) * units[text[-1].upper()]) if text[-1:].upper() in units else int(text)


def takes(options: argparse.Namespace) -> str:
    """The flag with which this version of Megatron's tool puts special tokens as the tokenizer does, if it has one."""
    command = [options.megatron_python, "-W", "ignore", str(options.megatron_lm / "tools/preprocess_data.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(options.megatron_lm)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"--megatron-lm {options.megatron_lm}: its tool does not start:\n{done.stderr[-2000:]}")
    flag = "--tokenizer-hf-include-special-tokens"
    return flag if flag in done.stdout else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch; what was downloaded stays for the next time")
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM; without it only ours runs")
    parser.add_argument("--megatron-python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--size", type=size, default="200M", help="of the .jsonl; default: 200M")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", nargs="+", default=["llama-3"], help="llama-3, mistral, or HF directories")
    parser.add_argument("--memory-size", type=size, default=0, help="such as 2G; default: not measured")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()

    place = options.dir.absolute()
    options.megatron_lm = options.megatron_lm and options.megatron_lm.absolute()
    options.special_flag = takes(options) if options.megatron_lm else ""
    texts = documents(place)
    source = place / "text.jsonl"
    source.unlink(missing_ok=True)
    write_jsonl(source, texts, options.size)
    print(f"{source.stat().st_size / 1e6:.0f} MB, {options.rounds} rounds, {len(texts)} different documents\n")
    print("| tokenizer | tool | workers | seconds | tokens/s | times as fast (range) | MiB a worker | MiB together |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    found = {name: run(name, place, source, options) for name in options.tokenizer}
    if options.memory_size:
        print()
        found["memory"] = memory(place, texts, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
