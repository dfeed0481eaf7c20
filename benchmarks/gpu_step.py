#!/usr/bin/env python3
"""One training step on one GPU: two-segment samples of 8K in BF16 and FP8, beside full ones of 64K, transformers and
Megatron-LM's own loop.

    python benchmarks/gpu_step.py [--layers 16] [--micro-batches 8] [--rounds 5] [--only TEXT ...] [--json OUT]
                                  [--megatron-lm DIR]

Needs CUDA, and for FP8 Transformer Engine.  Measured: gpu_step.md.

LLaMA-3-8B's shape with `--layers` of its 32 layers, random weights: 16 layers take 105 GiB by the plan (an H200), 8
fit one of 80 GB.  Each contender has a process and the GPU to itself, one after the other; a step is forward and
backward of `--micro-batches` sequences and one AdamW update, of full ones an eighth as many, which is the same tokens.
Printed for each: median seconds a step (and the range), tokens/s, model TFLOP/s, peak memory, and the planner's.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIG = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
)
TARGET, PHYSICAL, PROMPT, WARMUP = 65536, 8192, 11, 2
FP8 = ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"]
FULL = ["context.method=full", f"context.physical={TARGET}", "parallel.recompute=full"]
OURS = {
    "EndPrompt 8K, BF16": [],
    "EndPrompt 8K, FP8 matrix products": FP8,
    "EndPrompt 8K, FP8 with attention": [*FP8, "precision.fp8_attention=true"],
    "EndPrompt 8K, BF16, whole layers recomputed": ["parallel.recompute=full"],
    "full length 64K, BF16, whole layers recomputed": FULL,
    "full length 64K, FP8 with attention, recomputed": [*FULL, *FP8, "precision.fp8_attention=true"],
}
# As transformers trains by default, and with float32 master weights and optimizer state, as ours has them; compiled,
# the loss is one kernel with what comes before it.
TRANSFORMERS = {
    "transformers 8K, BF16 throughout": ("bfloat16", False),
    "transformers 8K, float32 weights, autocast": ("float32", False),
    "transformers 8K, float32 weights, autocast, compiled": ("float32", True),
}
MEGATRON_LM = {"Megatron-LM 8K, BF16": [], "Megatron-LM 8K, FP8 (tensorwise)": ["--fp8-format", "hybrid"]}


@dataclass(frozen=True)
class Contender:
    """Something to time.  `update` follows `backward`; `tokens` of a step; `flops` a token; `planned`: bytes."""

    backward: Callable[[], float]
    update: Callable[[float], None]
    tokens: int
    flops: float
    planned: float | None = None
    about: dict | None = None


def sample(recipe, vocab: int, seed: int) -> dict:
    """One sample of random tokens with the recipe's positions, [1, s] tensors on the GPU."""
    import torch

    from endprompt_megatron.method.positions import position_ids, segment_lengths

    c = recipe.context
    a, b = segment_lengths(c.method, c.physical, PROMPT, c.target)
    tokens = torch.randint(0, vocab, (1, a + b), generator=torch.Generator().manual_seed(seed))
    weights, mask = torch.ones(1, a + b), torch.zeros(1, a + b, dtype=torch.bool)
    weights[0, -1] = 0
    mask[0, a - 1 : -1] = b > 0
    positions = torch.from_numpy(position_ids(c.method, a, b, c.target))[None]
    batch = dict(tokens=tokens, labels=tokens.roll(-1, 1), position_ids=positions)
    return {key: value.cuda() for key, value in dict(batch, loss_weights=weights, prompt_mask=mask).items()}


def write_recipe(directory: Path, micro_batches: int) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(
        f"model: {{hf: {directory}}}\ncontext: {{target: {TARGET}, physical: {PHYSICAL}}}\ndata: {{train: none}}\n"
        f"train: {{steps: 100, global_batch_size: {micro_batches}}}\ncheckpoint: {{dir: {directory}/run}}\n"
    )
    return path


def ours(directory: Path, overrides: list[str], micro_batches: int) -> Contender:
    from endprompt_megatron.config.constraints.check import load_checked
    from endprompt_megatron.config.resolve import config_to_export
    from endprompt_megatron.data.samples.terminal_segments import positions_are_shared
    from endprompt_megatron.distributed import environment, runtime, te
    from endprompt_megatron.distributed.hardware import here

    if overrides[: len(FULL)] == FULL:
        micro_batches = max(1, micro_batches * PHYSICAL // TARGET)
    recipe, shape = load_checked(write_recipe(directory, micro_batches), overrides, world_size=1)
    environment.set_before_cuda(recipe, "benchmark")
    te.set_environment(recipe, "benchmark", here())
    runtime.start(1, 1, None, 1, seed=0)
    import torch

    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.plan.memory import memory
    from endprompt_megatron.training.optimizer import build_optimizer, update, wrap_models, zero_grad
    from endprompt_megatron.training.step import run_batch

    c = recipe.context
    config = config_to_export(recipe, shape, "benchmark")
    models = wrap_models(build_model(shape, recipe, config, shared_positions=positions_are_shared(recipe)), recipe)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer, _ = build_optimizer(recipe, models)
    optimizer.reload_model_params()
    batch = [sample(recipe, shape.vocab_size, seed) for seed in range(micro_batches)]

    def backward() -> float:
        zero_grad(models, optimizer)
        return run_batch(models, batch, backward=True).total

    (planned,) = memory(shape, recipe, 1, te=here().te is not None)
    return Contender(
        backward,
        lambda loss: update(optimizer, loss, 1.0),
        c.physical * micro_batches,
        flops_per_token(shape, c.physical),
        planned.allocated,
        {"fusions": fusions(models[0]), "attention": attention_backend},
    )


def fusions(model) -> dict[str, bool]:
    """What is done in one kernel."""
    from megatron.core.utils import get_model_config

    config = get_model_config(model)
    summed = [m.fuse_wgrad_accumulation for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    return {
        "RoPE": config.apply_rope_fusion,
        "loss": config.cross_entropy_loss_fusion,
        "weight gradients": bool(summed) and all(summed),
        "weight gradients of the output layer": config.gradient_accumulation_fusion,
    }


def attention_backend() -> str | None:
    """Which kernels Transformer Engine chose, after a step; None without it."""
    with contextlib.suppress(ImportError, AttributeError, KeyError):
        from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

        chosen = dot_product_attention._attention_backends
        if chosen["use_flash_attention"]:
            return "flash-attn"
        return f"cuDNN ({chosen['fused_attention_backend']})" if chosen["use_fused_attention"] else "unfused"
    return None


def transformers_step(directory: Path, weights: str, compiled: bool, micro_batches: int) -> Contender:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from endprompt_megatron.config.load import load_recipe
    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.model.shape import read_shape

    values = json.loads((directory / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = LlamaConfig(**{**values, "max_position_embeddings": TARGET, "rope_scaling": scaling})
    with torch.device("cuda"):
        dtype = getattr(torch, weights)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    shape, recipe = read_shape(directory), load_recipe(write_recipe(directory, micro_batches))
    batches = [sample(recipe, shape.vocab_size, seed)["tokens"] for seed in range(micro_batches)]

    def loss_of(tokens):
        # No mask: with one, its attention is not the fast kernel.  The tail then does not see the context (README);
        # the work is the same to within the prompt's 11 rows.
        return model(tokens, labels=tokens, use_cache=False).loss / micro_batches

    forward = torch.compile(loss_of) if compiled else loss_of

    def backward() -> float:
        optimizer.zero_grad()
        total = 0.0
        for tokens in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=weights == "float32"):
                loss = forward(tokens)
            loss.backward()
            total = total + loss.detach()
        return float(total)

    def update(_: float) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Contender(backward, update, PHYSICAL * micro_batches, flops_per_token(shape, PHYSICAL))


def measure(pipe, name: str, args: argparse.Namespace) -> None:
    import torch

    try:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": args.layers}))
            if name in TRANSFORMERS:
                contender = transformers_step(directory, *TRANSFORMERS[name], args.micro_batches)
            else:
                contender = ours(directory, OURS[name], args.micro_batches)
            for _ in range(WARMUP):
                contender.update(contender.backward())
            peaks = peak_of_each_half(contender)
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(args.rounds):
                torch.cuda.synchronize()
                started = time.perf_counter()
                contender.update(contender.backward())
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        about = {key: value() if callable(value) else value for key, value in (contender.about or {}).items()}
        result = timed(name, contender.tokens, contender.flops, seconds)
        gib = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, **peaks}
        if contender.planned is not None:
            gib["planned_gib"] = contender.planned / 2**30
        pipe.send({**result, **gib, **about})
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


def peak_of_each_half(contender: Contender) -> dict[str, float]:
    """Peak memory of forward and backward, and of the update, in GiB."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    loss = contender.backward()
    backward = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.update(loss)
    return {"backward_gib": backward / 2**30, "update_gib": torch.cuda.max_memory_allocated() / 2**30}


def megatron_lm(name: str, args: argparse.Namespace) -> dict:
    """Its pretrain_gpt.py at the same shape, with mock data; the seconds are its own log's."""
    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.model.shape import read_shape

    steps = 1 + WARMUP + args.rounds
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
        *("--cross-entropy-fusion-impl", "te", "--attention-backend", "fused", "--calculate-per-token-loss"),
        *("--no-gradient-accumulation-fusion", "--no-create-attention-mask-in-dataloader", "--num-workers", 1),
        *(
            "--eval-iters",
            0,
            "--eval-interval",
            10000,
            "--log-interval",
            1,
            "--split",
            "99,1,0",
            "--no-persist-layer-norm",
        ),
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
        return {"name": name, "error": f"exit code {done.returncode}: " + " ".join(text.split())[-600:]}
    found = timed(name, PHYSICAL * args.micro_batches, flops, seconds[-args.rounds :])
    peak = re.search(r"max allocated: ([0-9.]+)", text)
    return {**found, "peak_gib": float(peak[1]) / 1024 if peak else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--micro-batches", type=int, default=8)
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
    about, results = machine(), []
    names = [*OURS, *TRANSFORMERS, *(MEGATRON_LM if args.megatron_lm else [])]
    chosen = args.only if args.exactly else [name for name in names if any(text in name for text in args.only)]
    for name in (name for name in names if name in chosen):
        results.append(megatron_lm(name, args) if name in MEGATRON_LM else in_a_process(name, args))
        print(row(results[-1], results[0]), flush=True)
        if args.json:
            sizes = {"layers": args.layers, "micro_batches": args.micro_batches, "rounds": args.rounds}
            args.json.write_text(json.dumps({**about, **sizes, "results": results}, indent=2) + "\n")
    return 1 if any("error" in result for result in results) else 0


def in_a_process(name: str, args: argparse.Namespace) -> dict:
    context = multiprocessing.get_context("spawn")
    ours_end, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, name, args))
    process.start()
    theirs.close()  # so that a child that dies is read as the end of the pipe
    try:
        return ours_end.recv()
    except EOFError:
        process.join()
        return {"name": name, "error": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.join()


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
