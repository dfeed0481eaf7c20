#!/usr/bin/env python3
"""Conversion in both directions against `cp` of the same bytes, on the same disk: seconds and memory.

    python benchmarks/conversion.py --dir SCRATCH [--models 1b 8b 70b-cut] [--workers 1 2] [--rounds 3]
                                    [--other NAME="COMMAND {hf} {out}"] [--json OUT]

Random BF16 checkpoints with the true shapes of LLaMA-3.2-1B, LLaMA-3-8B and of LLaMA-3-70B's first layers are
written to SCRATCH first (and removed at the end).  In each round everything runs once, in turn, with the source
dropped from the page cache before; what is written is on the disk (fsync) when the clock stops, for `cp` too.
Memory is the anonymous memory of all processes together at its highest, sampled 20 times a second: pages of
files are the kernel's to drop.  `start` loads the weights into a model on one rank, from the Hugging Face
directory and from the converted checkpoint.  `--other` times another converter beside them.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_LLAMA3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
MODELS = {  # the name in the table, and the config
    "small": (
        "a small model",
        _LLAMA3 | dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8),
    ),
    "1b": (
        "LLaMA-3.2-1B",
        _LLAMA3
        | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
        | dict(head_dim=64, tie_word_embeddings=True),
    ),
    "8b": (
        "LLaMA-3-8B",
        _LLAMA3 | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    ),
    "70b-cut": (
        "LLaMA-3-70B, 8 of 80 layers",
        _LLAMA3 | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=8, num_attention_heads=64),
    ),
}
START = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from endprompt_megatron.checkpoint.resume import initialise
from endprompt_megatron.distributed import runtime
from endprompt_megatron.config.recipe import LongLora, Parallel, Precision
from endprompt_megatron.convert.direct import weights_at
from endprompt_megatron.common.files import read_json
from endprompt_megatron.model.shape import read_shape
hf, source = Path({hf!r}), Path({source!r})
runtime.start(1, 1, 1, 1, 1)
from endprompt_megatron.model.llama import build_chunks
shape = read_shape(hf)
config = read_json(hf / "config.json", "a config")
models = build_chunks(shape, config, Parallel(), Precision(), LongLora(), shared_positions=True)
before = time.monotonic()
initialise(weights_at(source, shape, "benchmark"), models, None)
print("seconds", time.monotonic() - before)
"""


def write_model(directory: Path, config: dict, seed: int = 0) -> int:
    """A checkpoint of random BF16 weights as transformers would shard it; returns its bytes."""
    import torch

    from endprompt_megatron.convert import hf_writing, mapping
    from endprompt_megatron.model.shape import read_shape

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    block = torch.randn(1 << 25, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()
    mapped = list(mapping.mapped_tensors(read_shape(directory)))
    files = hf_writing.files_of(mapped, "bfloat16", 5 * 10**9)
    sizes = {name: count // 2 for file in files for name, _, count in file.tensors}

    def rows(name: str) -> Iterator[torch.Tensor]:
        left, start = sizes[name], hash(name) % 1000
        while left:
            values = block[start : start + min(left, len(block) - start)]
            yield values
            left, start = left - len(values), 0

    for file in files:
        hf_writing.write_chunk(directory, hf_writing.one_chunk(file), "bfloat16", rows)
    if len(files) > 1:
        hf_writing.write_index(directory, files, "bfloat16")
    return sum(file.bytes for file in files)


def forget(directory: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def command(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def measured(result: dict) -> Iterator[None]:
    """Seconds, and the highest anonymous memory of this process's children together, in bytes."""
    import psutil

    end, highest = threading.Event(), [0]

    def watch() -> None:
        me = psutil.Process()
        while not end.wait(0.05):
            total = 0
            for process in me.children(recursive=True):
                with contextlib.suppress(OSError, IndexError):  # ended meanwhile
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    total += 1024 * int(status.split("RssAnon:")[1].split()[0])
            highest[0] = max(highest[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    try:
        yield
        result["seconds"] = time.monotonic() - began
    finally:
        end.set()
        thread.join()
        result["memory"] = highest[0]


def contenders(place: Path, workers: list[int], other: dict[str, str]) -> dict:
    """What runs: name -> (source, the call that writes `out`)."""
    hf, megatron, python = place / "hf", place / "megatron", sys.executable

    def tool(name: str, flag: str, source: Path, count: int, out: Path) -> None:
        path = str(ROOT / "tools" / f"{name}.py")
        command([python, path, flag, str(source), "--out", str(out), "--workers", str(count)])

    found = {"cp": (hf, functools.partial(copy, hf))}
    for count in workers:
        found[f"to Megatron-Core, workers {count}"] = (
            hf,
            functools.partial(tool, "convert_hf_to_megatron", "--hf", hf, count),
        )
        found[f"to Hugging Face, workers {count}"] = (
            megatron,
            functools.partial(tool, "convert_megatron_to_hf", "--megatron", megatron, count),
        )
    for name, line in other.items():
        found[name] = (hf, lambda out, line=line: command(["bash", "-c", line.format(hf=hf, out=out)]))
    return found


def starts(place: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds to load the weights into a model, from each side."""
    seconds: dict[str, list[float]] = {"hf": [], "megatron": []}
    for _ in range(rounds):
        for name in seconds:
            forget(place / name)
            script = START.format(root=str(ROOT), hf=str(place / "hf"), source=str(place / name))
            said = command([sys.executable, "-W", "ignore", "-c", script])
            seconds[name].append(float(said.split("seconds")[-1]))
    return seconds


def run(place: Path, name: str, options: argparse.Namespace, other: dict[str, str]) -> dict:
    title, config = MODELS[name]
    place.mkdir(parents=True)
    size = write_model(place / "hf", config)
    command([sys.executable, str(ROOT / "tools/convert_hf_to_megatron.py"), "--hf", str(place / "hf"),
             "--out", str(place / "megatron")])  # fmt: skip
    results: dict[str, dict[str, list]] = {}
    chosen = contenders(place, options.workers, other)
    for round_number in range(options.rounds):
        for contender, (source, write) in chosen.items():
            forget(source)
            result: dict = {}
            with measured(result):
                write(place / "out")
            shutil.rmtree(place / "out")
            for key, value in result.items():
                results.setdefault(contender, {}).setdefault(key, []).append(value)
            print(f"{title}, round {round_number + 1}: {contender} {result['seconds']:.1f} s", file=sys.stderr)
    loaded = starts(place, options.rounds) if name in options.start else {}
    return {"model": title, "bytes": size, "results": results, "start": loaded}


def table(measurements: list[dict]) -> str:
    lines = []
    for each in measurements:
        baseline = each["results"]["cp"]["seconds"]
        lines += [f"**{each['model']}**, {each['bytes'] / 1e9:.1f} GB", ""]
        lines += ["| | seconds | MB/s | to cp (range) | peak memory, GB |", "|---|---|---|---|---|"]
        for name, result in each["results"].items():
            seconds = statistics.median(result["seconds"])
            ratios = [one / other for one, other in zip(result["seconds"], baseline, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            memory = "" if name == "cp" else f"{max(result['memory']) / 1e9:.2f}"
            lines.append(f"| {name} | {seconds:.1f} | {each['bytes'] / seconds / 1e6:.0f} | {ratio} | {memory} |")
        if each["start"]:
            said = {name: f"{statistics.median(values):.1f} s" for name, values in each["start"].items()}
            lines += [
                "",
                f"Weights into a model: {said['hf']} from Hugging Face, {said['megatron']} from Megatron-Core",
            ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="an empty place on the disk to measure")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1b", "8b", "70b-cut"])
    parser.add_argument(
        "--start", nargs="*", choices=MODELS, default=["1b"], help="models to load into a model as well"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    other = dict(entry.split("=", 1) for entry in options.other)
    measurements = []
    for name in options.models:
        place = options.dir / f"conversion-{name}"
        try:
            measurements.append(run(place, name, options, other))
        finally:
            shutil.rmtree(place, ignore_errors=True)
        print(table(measurements[-1:]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(measurements, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
