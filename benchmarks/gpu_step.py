#!/usr/bin/env python3
"""One training step on one GPU: two-segment samples of 8K in BF16 and FP8, beside full ones of 64K, transformers and
Megatron-LM's own loop.

    python benchmarks/gpu_step.py [--layers N] [--micro-batches 8] [--rounds 5] [--only TEXT ...] [--json OUT]
                                  [--megatron-lm DIR]

Needs CUDA, and for FP8 Transformer Engine.  Measured: gpu_step.md.

LLaMA-3-8B's shape with `--layers` of its 32 layers, random weights: 16 layers take 106 GiB by the plan (an H200), 8
fit one of 80 GB.  Each contender has a process and the GPU to itself, one after the other; a step is forward and
backward of `--micro-batches` sequences and one AdamW update, of full ones an eighth as many, which is the same tokens.
Printed for each: median seconds a step (and the range), tokens/s, model TFLOP/s, peak memory, and the planner's.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_contenders import CONFIG, MEGATRON_LM, OURS, PHYSICAL, TRANSFORMERS, ours, transformers_step  # noqa: E402


def measure(pipe, name: str, args: argparse.Namespace) -> None:
    """In a process of its own: build the contender when its turn comes, and time it."""
    import torch

    def wait() -> None:
        pipe.send("ready")
        pipe.recv()

    try:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": args.layers}))
            make = transformers_step if name in TRANSFORMERS else ours
            contender = make(directory, name, args.micro_batches, wait)
            for _ in range(args.warmup):
                contender.update(contender.backward())
            peaks, seconds = [], []
            for _ in range(args.rounds):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                loss = contender.backward()
                torch.cuda.synchronize()
                peaks.append(torch.cuda.max_memory_allocated())
                contender.update(loss)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
                peaks.append(torch.cuda.max_memory_allocated())
        about = {key: value() if callable(value) else value for key, value in (contender.about or {}).items()}
        gib = {"backward_gib": max(peaks[::2]) / 2**30, "peak_gib": max(peaks) / 2**30}
        if contender.planned is not None:
            gib["planned_gib"] = contender.planned / 2**30
        pipe.send({**timed(name, contender.tokens, contender.flops, seconds), **gib, **about})
    except Exception as error:
        pipe.send({"name": name, "error": " ".join(str(error).split())[:300] or type(error).__name__})


def timed(name: str, tokens: int, flops: float, seconds: list[float]) -> dict:
    middle = statistics.median(seconds)
    return {
        "name": name,
        "tokens": tokens,
        "seconds": middle,
        "range": [min(seconds), max(seconds)],
        "tokens_per_s": tokens / middle,
        "tflops": flops * tokens / middle / 1e12,
    }


def megatron_lm(name: str, args: argparse.Namespace) -> dict:
    """Its pretrain_gpt.py at the same shape, with mock data; the seconds are its own log's."""
    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.model.shape import read_shape

    steps = 1 + args.warmup + args.rounds
    shape = [
        *("--num-layers", args.layers, "--hidden-size", 4096, "--ffn-hidden-size", 14336, "--kv-channels", 128),
        *("--num-attention-heads", 32, "--group-query-attention", "--num-query-groups", 8, "--swiglu"),
        *("--normalization", "RMSNorm", "--position-embedding-type", "rope", "--rotary-base", 500000),
        *("--untie-embeddings-and-output-weights", "--disable-bias-linear", "--vocab-size", 128255),
        *("--attention-dropout", 0, "--hidden-dropout", 0, "--seq-length", PHYSICAL),
        *("--max-position-embeddings", PHYSICAL, "--tokenizer-type", "NullTokenizer", "--mock-data"),
    ]
    training = [
        *("--micro-batch-size", 1, "--global-batch-size", args.micro_batches, "--train-iters", steps, "--lr", 2e-5),
        *("--bf16", "--use-distributed-optimizer", "--clip-grad", 1.0, "--cross-entropy-loss-fusion"),
        *("--cross-entropy-fusion-impl", "native", "--attention-backend", "fused", "--calculate-per-token-loss"),
        *("--no-gradient-accumulation-fusion", "--no-create-attention-mask-in-dataloader", "--num-workers", 1),
        *("--eval-iters", 0, "--eval-interval", 10000, "--log-interval", 1, "--split", "99,1,0"),
        "--no-persist-layer-norm",
        *(["--fp8-recipe", "tensorwise"] if MEGATRON_LM[name] else []),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "pretrain_gpt.py"),
            *(*shape, *training, *MEGATRON_LM[name], "--data-cache-path", scratch),
        ]
        # Its own Megatron-Core, of the same version as the one that is installed.
        environment = os.environ | {"PYTHONPATH": f"{args.megatron_lm}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            list(map(str, command)), cwd=args.megatron_lm, env=environment, capture_output=True, text=True
        )
        (Path(scratch) / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": args.layers}))
        flops = flops_per_token(read_shape(Path(scratch)), PHYSICAL)
    text = done.stdout + done.stderr
    seconds = [float(ms) / 1000 for ms in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", text)]
    if done.returncode or len(seconds) < steps:
        errors = re.findall(r"^(?:\[rank\d\]: )?(\w*Error: .*)$", text, re.MULTILINE)
        return {"name": name, "error": f"exit code {done.returncode}: {(errors or [''])[0]}"}
    found = timed(name, PHYSICAL * args.micro_batches, flops, seconds[-args.rounds :])
    peaks = re.findall(r"max allocated: ([0-9.]+)", text)  # MiB, the last with the optimizer's state
    return {**found, "peak_gib": float(peaks[-1]) / 1024 if peaks else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="[16 where the GPU has 120 GiB, otherwise 8]")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that are timed [2]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="contenders whose names hold one of these"
    )
    parser.add_argument("--exactly", action="store_true", help="whose names are one of these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="a checkout of Megatron-LM, to be timed too")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 2
    if args.layers is None:
        args.layers = 16 if torch.cuda.get_device_properties(0).total_memory >= 120 * 2**30 else 8
    about, results = machine(), []
    names = [*OURS, *TRANSFORMERS, *(MEGATRON_LM if args.megatron_lm else [])]
    chosen = args.only if args.exactly else [name for name in names if any(text in name for text in args.only)]
    names = [name for name in names if name in chosen]
    if not names:
        print(f"error: --only {' '.join(args.only)}: no contender's name holds that", file=sys.stderr)
        return 2
    waiting = {name: Waiting(name, args) for name in names if name not in MEGATRON_LM}
    for name in names:
        results.append(megatron_lm(name, args) if name in MEGATRON_LM else waiting[name].result())
        print(row(results[-1], results[0]), flush=True)
        if args.json:
            sizes = {"layers": args.layers, "micro_batches": args.micro_batches, "rounds": args.rounds}
            args.json.write_text(json.dumps({**about, **sizes, "results": results}, indent=2) + "\n")
    return 1 if any("error" in result for result in results) else 0


class Waiting:
    """A contender's process, which imports what it needs while others are timed, and builds nothing before its turn."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, theirs) = name, context.Pipe()
        self.process = context.Process(target=measure, args=(theirs, name, args), daemon=True)
        self.process.start()
        theirs.close()  # so that a child that dies is read as the end of the pipe

    def result(self) -> dict:
        try:
            answer = self.pipe.recv()
            if answer == "ready":
                self.pipe.send("go")
                answer = self.pipe.recv()
            return answer
        except EOFError:
            self.process.join()
            return {"name": self.name, "error": f"its process ended with exit code {self.process.exitcode}"}
        finally:
            self.process.kill()
            self.process.join()


def machine() -> dict[str, str]:
    """The GPU and the versions that the figures belong to."""
    import torch

    from endprompt_megatron.preflight.node import versions

    return {"gpu": torch.cuda.get_device_name(), **versions()[0]}


def row(result: dict, first: dict) -> str:
    if "error" in result:
        return f"| {result['name']} | {result['error']} |"
    low, high = result["range"]
    ratio = f"{result['tokens_per_s'] / first['tokens_per_s']:.2f}" if "error" not in first else "-"
    memory = "-" if result["peak_gib"] is None else f"{result['peak_gib']:.1f} GiB"
    planned = f"{result['planned_gib']:.1f} GiB" if "planned_gib" in result else "-"
    return (
        f"| {result['name']} | {result['seconds']:.3f} s ({low:.3f} to {high:.3f}) | {result['tokens_per_s']:,.0f} | "
        f"{ratio} | {result['tflops']:.0f} | {memory} | {planned} |"
    )


if __name__ == "__main__":
    sys.exit(main())
