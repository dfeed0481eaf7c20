#!/usr/bin/env python3
"""What a token costs by each method at equal target length: time and peak memory, beside what the planner says.

    python benchmarks/methods_cost.py [--targets 4096 8192] [--layers 8] [--rounds 5] [--threads 2] [--json OUT]

SmolLM2-135M's shape with fewer layers and random weights, or the shape in --config.  A step is one target length of
tokens, whatever the method, so that the optimizer's share is the same:

  end_prompt   target / --short sequences of --short times fewer tokens, with a terminal prompt, all parameters trained
  full         one sequence of the target's length, all parameters trained
  shifted      the same with shifted sparse attention (LongLoRA's full-parameter form)
  longlora     shifted sparse attention, LoRA of rank 8, embeddings and norms

Each is a process of its own; they take turns, and who goes first changes from round to round.  Memory is the peak of
what torch allocates on a GPU, on a CPU the peak of the resident set beyond what it is before the model is built.
Predicted are memory, and time: by FLOPs alone, and on a GPU by the planner's clock for it.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training_step import PROMPT, SMOLLM2

LORA = ["longlora.rank=8"]
SHIFTED = ["longlora.shifted=true"]
METHODS = {"end_prompt": [], "full": [], "shifted": SHIFTED, "longlora": [*SHIFTED, *LORA]}


def recipe_of(directory: Path, method: str, target: int, short: int):
    from endprompt_megatron.config.load import load_recipe

    sequences = short if method == "end_prompt" else 1
    kind = "end_prompt" if method == "end_prompt" else "full"
    path = directory / f"{method}-{target}.yaml"
    path.write_text(
        f"model: {{hf: {directory}}}\n"
        f"context: {{method: {kind}, original: {target // 8}, target: {target}, physical: {target // sequences}}}\n"
        f"data: {{train: none}}\ntrain: {{steps: 100, global_batch_size: {sequences}}}\n"
        f"checkpoint: {{dir: {directory}/run}}\n"
    )
    return load_recipe(path, METHODS[method])


def sample(recipe, vocabulary: int, seed: int) -> dict:
    """One micro-batch of random tokens, [1, s] tensors."""
    import torch

    from endprompt_megatron.distributed.runtime import device
    from endprompt_megatron.method.positions import position_ids, segment_lengths

    c = recipe.context
    context, prompt = segment_lengths(c.method, c.physical, PROMPT, c.target)
    length = context + prompt
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (1, length), generator=generator)
    weights = torch.ones(1, length)
    weights[0, -1] = 0
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, context - 1 : -1] = prompt > 0
    positions = torch.from_numpy(position_ids(c.method, context, prompt, c.target))[None]
    batch = dict(tokens=tokens, labels=tokens.roll(-1, 1), position_ids=positions)
    batch |= dict(loss_weights=weights, prompt_mask=mask)
    return {key: value.to(device()) for key, value in batch.items()}


def serve(pipe, directory: Path, method: str, target: int, short: int, threads: int) -> None:
    """Build, take two steps to warm up, then a step whenever asked: (seconds, loss, peak GiB)."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    from endprompt_megatron.config.constraints.check import check
    from endprompt_megatron.config.resolve import config_to_export
    from endprompt_megatron.distributed import runtime

    runtime.quiet_libraries()
    recipe = recipe_of(directory, method, target, short)
    shape = check(recipe, "benchmark", world_size=1)
    runtime.start(1, 1, None, 1, seed=0)
    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.training.optimizer import build_optimizer, update, wrap_models, zero_grad
    from endprompt_megatron.training.step import run_batch

    exported = config_to_export(recipe, shape, "benchmark")
    before = 0.0 if runtime.has_cuda() else runtime.peak_memory_gib()
    models = wrap_models(build_model(shape, recipe, exported), recipe.parallel, recipe.precision)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer, _ = build_optimizer(models, recipe.optim, recipe.precision, recipe.train.steps)
    optimizer.reload_model_params()
    batch = [sample(recipe, shape.vocab_size, seed) for seed in range(recipe.train.global_batch_size)]

    def step() -> float:
        zero_grad(models, optimizer)
        losses = run_batch(models, batch, backward=True)
        update(optimizer, losses.total, 1.0)
        torch.cuda.synchronize()
        return losses.total

    step()
    step()
    pipe.send("ready")
    while pipe.recv() == "step":
        started = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - started, loss, runtime.peak_memory_gib() - before))


def measure(directory: Path, target: int, args: argparse.Namespace) -> dict[str, list]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for method in args.methods:
        pipes[method], theirs = context.Pipe()
        job = (theirs, directory, method, target, args.short, args.threads)
        processes.append(context.Process(target=serve, args=job))
        processes[-1].start()
        if pipes[method].recv() != "ready":
            raise RuntimeError(f"{method} did not start")
    results: dict[str, list] = {method: [] for method in args.methods}
    for round_number in range(args.rounds):
        first = round_number % len(args.methods)
        for method in args.methods[first:] + args.methods[:first]:
            pipes[method].send("step")
            results[method].append(pipes[method].recv())
    for pipe in pipes.values():
        pipe.send("stop")
    for process in processes:
        process.join()
    return results


def predicted(directory: Path, method: str, target: int, short: int) -> dict[str, float]:
    """FLOPs a token, seconds a step by the planner's clock (0 on a CPU), and GiB that should be allocated."""
    from endprompt_megatron.distributed.hardware import has_transformer_engine, here
    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.model.shape import read_shape
    from endprompt_megatron.plan.memory import GIB, memory
    from endprompt_megatron.plan.step_time import Clock

    recipe, shape, gpu = recipe_of(directory, method, target, short), read_shape(directory), here().gpu
    (stage,) = memory(shape, recipe, 1, te=has_transformer_engine())
    flops = flops_per_token(shape, recipe.context.physical, recipe.longlora)
    seconds = Clock(shape, recipe, gpu, 1).step().total if gpu else 0.0
    return {"flops": flops, "seconds": seconds, "gib": stage.allocated / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--short", type=int, default=8, help="target / physical length of end_prompt (default 8)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--config", type=Path, help="a Hugging Face config.json to take the shape from")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.methods[0] != "end_prompt":
        parser.error("--methods: end_prompt comes first, the others are compared with it")
    report = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = SMOLLM2 | {"model_type": "llama", "num_hidden_layers": args.layers}
        if args.config:
            config = json.loads(args.config.read_text())
        (directory / "config.json").write_text(json.dumps(config))
        print(
            "| target | method | ms a token | over end_prompt (range) | by FLOPs | by the planner's clock | "
            "peak GiB | planned | over end_prompt | planned |"
        )
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for target in args.targets:
            results = measure(directory, target, args)
            plans = {method: predicted(directory, method, target, args.short) for method in args.methods}
            base, base_plan = results["end_prompt"], plans["end_prompt"]
            for method in args.methods:
                seconds = [second for second, _, _ in results[method]]
                ratios = [mine / theirs for mine, (theirs, _, _) in zip(seconds, base, strict=True)]
                plan, peak = plans[method], results[method][-1][2]
                report[f"{method}-{target}"] = row = {
                    "ms_a_token": statistics.median(seconds) / target * 1e3,
                    "time_over_end_prompt": statistics.median(ratios),
                    "range": [min(ratios), max(ratios)],
                    "flops_over_end_prompt": plan["flops"] / base_plan["flops"],
                    "clock_over_end_prompt": plan["seconds"] / base_plan["seconds"] if plan["seconds"] else None,
                    "peak_gib": peak,
                    "planned_gib": plan["gib"],
                    "memory_over_end_prompt": peak / base[-1][2],
                    "planned_memory_over_end_prompt": plan["gib"] / base_plan["gib"],
                    "loss": [results[method][0][1], results[method][-1][1]],
                }
                clock = row["clock_over_end_prompt"]
                print(
                    f"| {target} | {method} | {row['ms_a_token']:.3f} | {row['time_over_end_prompt']:.2f} "
                    f"({min(ratios):.2f} to {max(ratios):.2f}) | {row['flops_over_end_prompt']:.2f} "
                    f"| {f'{clock:.2f}' if clock else ''} | {peak:.2f} | {plan['gib']:.2f} "
                    f"| {row['memory_over_end_prompt']:.2f} | {row['planned_memory_over_end_prompt']:.2f} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
