#!/usr/bin/env python3
"""Packing documents: how full the rows are, how long the index takes, how fast rows are read and trained on.

    python benchmarks/packing.py --dir SCRATCH [--counts 1000000 10000000] [--rounds 9] [--json OUT]

Documents are the files of two Debian packages (python3.11-doc: the sources of its pages; perl-doc: its pods and
manual pages), tokenised with SmolLM2's tokenizer; both are downloaded to SCRATCH (apt-get, pip), where everything
stays.  For the time of the index, the lengths of these documents are drawn again and again.
"""

import argparse
import gzip
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
warnings.filterwarnings("ignore")  # megatron.core names every optional package that is absent

PACKAGES = ("python3.11-doc", "perl-doc")
LENGTHS = (2048, 4096, 8192)
ALIGNMENTS = (1, 4, 16)
TARGET = 65536
NEED = 20_000  # tokens/s a rank


def corpus(scratch: Path) -> tuple[Path, Path]:
    """PREFIX of the tokenised documents, and the tokenizer's directory."""
    from endprompt_megatron.demo.assets import fetch

    model = fetch(scratch / "assets").model
    prefix = scratch / "documents"
    if not Path(f"{prefix}.json").exists():
        with open(scratch / "documents.jsonl", "w", encoding="utf-8") as file:
            for text in texts(scratch):
                file.write(json.dumps({"text": text}) + "\n")
        command = [sys.executable, ROOT / "tools" / "prepare_data.py", "--input", scratch / "documents.jsonl"]
        subprocess.run([*map(str, command), "--tokenizer", str(model), "--out", str(prefix)], check=True)
    return prefix, model


def texts(scratch: Path) -> Iterator[str]:
    """Every page of the packages."""
    for package in PACKAGES:
        place = scratch / package
        if not place.exists():
            subprocess.run(["apt-get", "download", package], cwd=scratch, check=True)
            [archive] = scratch.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", str(archive), str(place)], check=True)
        for path in sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink():
                if path.name.endswith((".rst.txt", ".pod")):
                    yield path.read_text(encoding="utf-8", errors="replace")
                elif path.suffix == ".gz" and "man" in path.parts:
                    yield gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")


def efficiency(lengths: np.ndarray, prompt: int) -> list[dict]:
    """Share of real tokens in packed rows, and in rows of one piece each."""
    from endprompt_megatron.data.samples.packing import Packing, pack_epoch

    found = []
    for row in LENGTHS:
        for align in ALIGNMENTS:
            counts = pack_epoch(lengths, Packing(row, row - prompt, 2, (prompt,), align, seed=1), 0).counts
            alone = counts.rows * counts.efficiency(row) / counts.samples
            found.append(
                {
                    "row": row,
                    "align": align,
                    "rows": counts.rows,
                    "samples": counts.samples,
                    "real": counts.efficiency(row),
                    "real_alone": alone,
                    "left_out": counts.left_out,
                }
            )
            print(
                f"rows of {row:>5}, aligned to {align:>2}: {counts.samples:>6,} samples in {counts.rows:>6,} rows, "
                f"{counts.efficiency(row):.2%} real tokens (one piece a row: {alone:.2%}), {counts.left_out} left out"
            )
    return found


def index_seconds(lengths: np.ndarray, count: int, row: int, prompt: int) -> dict:
    """Time and memory of packing `count` documents of these lengths, in a process of its own."""
    drawn = np.random.default_rng(0).choice(lengths, count).astype(np.int32)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(pack, (drawn, row, prompt))


def pack(lengths: np.ndarray, row: int, prompt: int) -> dict:
    from endprompt_megatron.data.samples.packing import Packing, cached_epoch

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    packing = Packing(row, row - prompt, 2, (prompt,), 1, seed=1)
    with tempfile.TemporaryDirectory() as cache:
        times = []
        for _ in range(2):  # packed and written; then found
            started = time.perf_counter()
            counts = cached_epoch(lengths, packing, 0, Path(cache), {}).counts
            times.append(time.perf_counter() - started)
        size = sum(path.stat().st_size for path in Path(cache).iterdir())
    peak = resident("VmHWM") - before
    found = {"documents": len(lengths), "row": row, "seconds": times[0], "found_s": times[1], "peak_gib": peak}
    found |= {"tokens": counts.context_tokens, "real": counts.efficiency(row), "cache_mib": size / 2**20}
    print(
        f"{len(lengths):>10,} documents, {counts.context_tokens / 1e9:.1f} B tokens, rows of {row}: {times[0]:.1f} s "
        f"({times[1]:.3f} s when it is there), {peak:.2f} GiB above the lengths, {size / 2**20:.0f} MiB of cache, "
        f"{counts.efficiency(row):.2%} real tokens",
        flush=True,
    )
    return found


def resident(name: str) -> float:
    """This process's memory now (VmRSS) or at its highest (VmHWM), in GiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 2**20


def dataset(prefix: Path, scratch: Path, row: int, prompt: list[int], method: str, packing: str, rows: int = 1):
    from endprompt_megatron.data.samples.builder import SampleSpec
    from endprompt_megatron.data.samples.dataset import DataSpec, WeightedDataset, build_datasets

    sample = SampleSpec(method, row, TARGET, [prompt], 1.0, seed=1)
    data = DataSpec([WeightedDataset(str(prefix))], packing=packing)
    return build_datasets(sample, data, rows, vocab_size=49152, cache_dir=scratch / "index")[0]


def reading(prefix: Path, scratch: Path, prompt: list[int], rounds: int) -> list[dict]:
    """Rows a second that a rank reads and joins to micro-batches, one thread, the corpus in memory."""
    from endprompt_megatron.data.samples.batches import MicroBatches

    found = []
    for row in LENGTHS:
        for method in ("end_prompt", "end_prompt_random"):
            packed = dataset(prefix, scratch, row, prompt, method, "documents")
            speeds = []
            for number in range(rounds + 1):
                batches = MicroBatches(packed, 0, 1, 0, 1)
                count = min(len(packed), 300)
                started = time.perf_counter()
                for _ in range(count):
                    next(batches)
                if number:  # the first round warms up
                    speeds.append(count / (time.perf_counter() - started))
            speed = statistics.median(speeds)
            margin = speed * row / NEED
            found.append({"row": row, "method": method, "rows_per_s": speed, "range": [min(speeds), max(speeds)]})
            found[-1]["margin"] = margin
            print(
                f"rows of {row:>5}, {method:>17}: {speed:>7,.0f} rows/s ({min(speeds):,.0f} to {max(speeds):,.0f}), "
                f"{speed * row / 1e6:.1f} M tokens/s: {margin:,.0f} times the need of {NEED:,} tokens/s"
            )
    return found


def stepping(prefix: Path, scratch: Path, prompt: list[int], rounds: int, length: int, threads: int) -> dict:
    """Seconds of a training step of SmolLM2's shape over a packed row and over one of the stream, in turn.

    Of the packed rows, those with the most sequences: a call of the attention each.
    """
    import torch
    import training_step

    from endprompt_megatron.data.samples.batches import MicroBatches, join_rows

    torch.set_num_threads(threads)
    packed, stream = (
        dataset(prefix, scratch, length, prompt, "end_prompt", packing, 100) for packing in ("documents", "stream")
    )
    fullest = sorted(range(len(packed)), key=lambda row: -len(packed.rows.samples(row)))[: rounds + 1]
    kinds = {
        "documents": iter([join_rows([packed[row]]) for row in fullest]),
        "stream": MicroBatches(stream, 0, 1, 0, 1),
    }
    with tempfile.TemporaryDirectory() as directory:
        config = dict(training_step.SMOLLM2, model_type="llama", architectures=["LlamaForCausalLM"])
        (Path(directory) / "config.json").write_text(json.dumps(config))
        step = training_step.ours(directory, length)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        sequences = []
        for number in range(rounds + 1):
            for kind, batches in kinds.items():
                batch = next(batches)
                sequences += [len(batch["cu_seqlens"]) - 1] if "cu_seqlens" in batch else []
                started = time.perf_counter()
                step(batch)
                if number:
                    times[kind].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times["documents"], times["stream"], strict=True)]
    found = {f"{kind}_s": statistics.median(values) for kind, values in times.items()}
    found |= {"length": length, "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    held = f"{statistics.mean(sequences):.1f} sequences a row"
    print(
        f"step of {length} tokens: packed ({held}) {found['documents_s']:.3f} s, stream {found['stream_s']:.3f} s, "
        f"ratio {found['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory; what was downloaded stays there")
    parser.add_argument("--counts", type=int, nargs="*", default=[1_000_000, 10_000_000], help="documents to pack")
    parser.add_argument("--rounds", type=int, default=9, help="of reading and of steps; default: 9")
    parser.add_argument("--step-length", type=int, default=1024, help="tokens of a training step; 0: none")
    parser.add_argument("--threads", type=int, default=2, help="of a training step; default: 2")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    prefix, model = corpus(args.dir)

    import torch

    from endprompt_megatron.data.indexed import read_idx
    from endprompt_megatron.method.prompts import tokenise_prompts

    torch.set_num_threads(1)
    lengths = np.array(read_idx(prefix).lengths)
    [prompt] = tokenise_prompts(model, ["EP_1"])
    quartiles = np.percentile(lengths, (0, 25, 50, 75, 100)).astype(int).tolist()
    print(f"{len(lengths):,} documents, {lengths.sum():,} tokens; quartiles of their lengths {quartiles}")
    report = {"documents": len(lengths), "tokens": int(lengths.sum()), "quartiles": quartiles}
    report["efficiency"] = efficiency(lengths, len(prompt))
    sizes = [(count, row) for count in args.counts for row in (LENGTHS[0], LENGTHS[-1])]
    report["index"] = [index_seconds(lengths, count, row, len(prompt)) for count, row in sizes]
    report["reading"] = reading(prefix, args.dir, prompt, args.rounds)
    if args.step_length:
        report["step"] = stepping(prefix, args.dir, prompt, args.rounds, args.step_length, args.threads)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
