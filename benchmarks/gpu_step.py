#!/usr/bin/env python3
"""One training step on one GPU: an 8K two-segment sample in BF16 and FP8, beside a full 64K one and transformers.

    python benchmarks/gpu_step.py [--layers 4] [--rounds 10] [--only TEXT] [--json OUT]

Needs CUDA, and for FP8 Transformer Engine.  Measured: gpu_step.md.

LLaMA-3-8B's shape with `--layers` of its 32 layers, so that weights, gradients and optimizer state fit one 80 GB
GPU; random weights.  Each contender has a process and the GPU to itself, one after the other; a step is forward,
backward and AdamW.  Printed for each: median seconds a step (and the range), tokens/s, model TFLOP/s, peak memory.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
TARGET, PHYSICAL, PROMPT, WARMUP = 65536, 8192, 11, 3
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
# As transformers trains by default, and with float32 master weights and optimizer state, as ours has them.
TRANSFORMERS = {"transformers 8K, BF16 throughout": "bfloat16", "transformers 8K, BF16 autocast": "float32"}


def sample(recipe, vocab: int) -> dict:
    """One sample of random tokens with the recipe's positions, [1, s] tensors on the GPU."""
    import torch

    from endprompt_megatron.method.positions import position_ids, segment_lengths

    c = recipe.context
    a, b = segment_lengths(c.method, c.physical, PROMPT, c.target)
    tokens = torch.randint(0, vocab, (1, a + b), generator=torch.Generator().manual_seed(0))
    weights, mask = torch.ones(1, a + b), torch.zeros(1, a + b, dtype=torch.bool)
    weights[0, -1] = 0
    mask[0, a - 1 : -1] = b > 0
    positions = torch.from_numpy(position_ids(c.method, a, b, c.target))[None]
    batch = dict(tokens=tokens, labels=tokens.roll(-1, 1), position_ids=positions)
    return {key: value.cuda() for key, value in dict(batch, loss_weights=weights, prompt_mask=mask).items()}


def ours(directory: Path, overrides: list[str]):
    from endprompt_megatron.config.constraints.check import load_checked
    from endprompt_megatron.config.resolve import config_to_export
    from endprompt_megatron.data.samples.terminal_segments import positions_are_shared
    from endprompt_megatron.distributed import runtime, te
    from endprompt_megatron.distributed.hardware import here

    path = directory / "recipe.yaml"
    path.write_text(
        f"model: {{hf: {directory}}}\ncontext: {{target: {TARGET}, physical: {PHYSICAL}}}\ndata: {{train: none}}\n"
        f"train: {{steps: 100, global_batch_size: 1}}\ncheckpoint: {{dir: {directory}/run}}\n"
    )
    recipe, shape = load_checked(path, overrides, world_size=1)
    te.set_environment(recipe, "benchmark", here())
    runtime.start(1, 1, None, 1, seed=0)
    import torch

    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.training.optimizer import build_optimizer, update, wrap_models, zero_grad
    from endprompt_megatron.training.step import run_batch

    c = recipe.context
    config = config_to_export(recipe, shape, "benchmark")
    models = wrap_models(build_model(shape, recipe, config, shared_positions=positions_are_shared(recipe)), recipe)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer, _ = build_optimizer(recipe, models)
    batch = [sample(recipe, shape.vocab_size)]

    def step() -> None:
        zero_grad(models, optimizer)
        losses = run_batch(models, batch, backward=True)
        update(optimizer, losses.total, 1.0)

    return step, c.physical, flops_per_token(shape, c.physical)


def transformers_step(directory: Path, weights: str):
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
    (directory / "recipe.yaml").write_text(
        f"model: {{hf: {directory}}}\ncontext: {{target: {TARGET}, physical: {PHYSICAL}}}\n"
        f"train: {{steps: 100}}\ncheckpoint: {{dir: {directory}/run}}\n"
    )
    shape = read_shape(directory)
    batch = sample(load_recipe(directory / "recipe.yaml"), shape.vocab_size)

    def step() -> None:
        optimizer.zero_grad()
        # No mask: with one, its attention is not the fast kernel.  The tail then does not see the context (README);
        # the work is the same to within the prompt's 11 rows.
        with torch.autocast("cuda", torch.bfloat16, enabled=weights == "float32"):
            loss = model(batch["tokens"], labels=batch["tokens"], use_cache=False).loss
        loss.backward()
        optimizer.step()

    return step, PHYSICAL, flops_per_token(shape, PHYSICAL)


def measure(pipe, name: str, layers: int, rounds: int) -> None:
    import torch

    try:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
            theirs = TRANSFORMERS.get(name)
            step, length, flops = transformers_step(directory, theirs) if theirs else ours(directory, OURS[name])
            for _ in range(WARMUP):
                step()
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(rounds):
                torch.cuda.synchronize()
                started = time.perf_counter()
                step()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        middle = statistics.median(seconds)
        pipe.send(
            {
                "name": name,
                "tokens": length,
                "seconds": middle,
                "range": [min(seconds), max(seconds)],
                "tokens_per_s": length / middle,
                "tflops": flops * length / middle / 1e12,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            }
        )
    except Exception as error:
        pipe.send({"name": name, "error": " ".join(str(error).split())[:200] or type(error).__name__})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", metavar="TEXT", help="contenders whose names hold this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: this benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    about, results = machine(), []
    for name in (name for name in [*OURS, *TRANSFORMERS] if args.only in name):
        ours_end, theirs = context.Pipe()
        process = context.Process(target=measure, args=(theirs, name, args.layers, args.rounds))
        process.start()
        theirs.close()  # so that a child that dies is read as the end of the pipe
        try:
            results.append(ours_end.recv())
        except EOFError:
            process.join()
            results.append({"name": name, "error": f"its process ended with exit code {process.exitcode}"})
        process.join()
        print(row(results[-1], results[0]), flush=True)
        if args.json:
            found = dict(about, layers=args.layers, rounds=args.rounds, results=results)
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


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
    return (
        f"| {result['name']} | {result['seconds']:.3f} s ({low:.3f} to {high:.3f}) | {result['tokens_per_s']:,.0f} | "
        f"{ratio} | {result['tflops']:.0f} | {result['peak_gib']:.1f} GiB |"
    )


if __name__ == "__main__":
    sys.exit(main())
