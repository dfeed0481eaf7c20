#!/usr/bin/env python3
"""One training step of SmolLM2-135M's shape, 1024 tokens, BF16, 2 threads: this project beside transformers.

    python benchmarks/training_step.py [--rounds 9] [--length 1024] [--threads 2] [--json OUT]

Three contenders, each in a process of its own, one step of each in turn:

  ours         Megatron-Core model, BF16 weights, float32 master weights and AdamW state, clipping
  hf-master    transformers' model as its Trainer runs it with bf16=True: float32 weights under autocast,
               fused AdamW, clipping.  Keeps as much precision as ours: the like-for-like comparison
  hf-pure      transformers' model with BF16 weights and BF16 AdamW state: no master weights, half the
               optimizer traffic; small updates are lost in rounding

Random weights; the same tokens and position ids (a two-segment sample); loss, gradients and update are all
in the time.  Peak memory is the resident set of each process.
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

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
PROMPT = 11
TARGET = 16384


def sample(length: int) -> dict:
    """One two-segment sample of random tokens, [1, length] tensors."""
    import torch

    from endprompt_megatron.method.positions import position_ids

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SMOLLM2["vocab_size"], (1, length), generator=generator)
    weights = torch.ones(1, length)
    weights[0, -1] = 0
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, length - PROMPT - 1 : -1] = True
    positions = torch.from_numpy(position_ids("end_prompt", length - PROMPT, PROMPT, TARGET))[None]
    labels = torch.cat([tokens[:, 1:], torch.zeros(1, 1, dtype=torch.long)], dim=1)
    return dict(tokens=tokens, labels=labels, position_ids=positions, loss_weights=weights, prompt_mask=mask)


def ours(directory: str, length: int):
    from endprompt_megatron.config.load import load_recipe
    from endprompt_megatron.config.resolve import config_to_export, resolve
    from endprompt_megatron.distributed import runtime

    runtime.start(1, 1, None, 1, seed=0)
    import torch

    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.model.shape import read_shape
    from endprompt_megatron.training.optimizer import build_optimizer, update, wrap_models, zero_grad
    from endprompt_megatron.training.step import run_batch

    path = Path(directory) / "recipe.yaml"
    path.write_text(
        f"model: {{hf: {directory}}}\ncontext: {{target: {TARGET}, physical: {length}}}\ndata: {{train: none}}\n"
        f"train: {{steps: 100, global_batch_size: 1}}\ncheckpoint: {{dir: {directory}/run}}\n"
    )
    recipe = load_recipe(path)
    shape = read_shape(directory)
    resolve(recipe, shape)
    config = config_to_export(recipe, shape, "benchmark")
    models = wrap_models(build_model(shape, recipe, config), recipe.parallel, recipe.precision)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer, scheduler = build_optimizer(models, recipe.optim, recipe.precision, recipe.train.steps)
    one = sample(length)

    def step(batch: dict = one) -> float:
        zero_grad(models, optimizer)
        losses = run_batch(models, [batch], backward=True)
        update(optimizer, losses.total, 1.0)
        scheduler.step(increment=1)
        return losses.total

    return step


def huggingface(directory: str, length: int, master: bool):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = LlamaConfig(**{**SMOLLM2, "max_position_embeddings": TARGET, "rope_scaling": scaling})
    model = LlamaForCausalLM(config).to(torch.float32 if master else torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    batch = sample(length)
    arguments = dict(
        input_ids=batch["tokens"],
        labels=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=torch.ones_like(batch["tokens"]),
        use_cache=False,
    )

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=master):
            loss = model(**arguments).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def serve(pipe, name: str, directory: str, length: int, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    from endprompt_megatron.distributed.runtime import peak_memory_gib, quiet_libraries

    quiet_libraries()
    step = ours(directory, length) if name == "ours" else huggingface(directory, length, name == "hf-master")
    step()
    step()
    pipe.send("ready")
    while pipe.recv() == "step":
        started = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - started, loss, peak_memory_gib()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = dict(SMOLLM2, model_type="llama", architectures=["LlamaForCausalLM"])
        (Path(directory) / "config.json").write_text(json.dumps(config))
        context = multiprocessing.get_context("spawn")
        names = ("ours", "hf-master", "hf-pure")
        pipes, processes = {}, []
        for name in names:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, directory, args.length, args.threads))
            process.start()
            processes.append(process)
            assert pipes[name].recv() == "ready"
        results = {name: [] for name in names}
        for round_number in range(args.rounds):
            # Who goes first changes, so that no one always follows the same neighbour.
            order = names[round_number % 3 :] + names[: round_number % 3]
            for name in order:
                pipes[name].send("step")
                results[name].append(pipes[name].recv())
        for name in names:
            pipes[name].send("stop")
        for process in processes:
            process.join()
    report = {}
    for name in names:
        seconds = [second for second, _, _ in results[name]]
        ratios = [theirs / mine for theirs, mine in zip(seconds, (s for s, _, _ in results["ours"]), strict=True)]
        report[name] = {
            "median_s": statistics.median(seconds),
            "tokens_per_s": args.length / statistics.median(seconds),
            "peak_gib": results[name][-1][2],
            "time_over_ours": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
        print(
            f"{name:10} {report[name]['median_s']:7.3f} s/step {report[name]['tokens_per_s']:7.0f} tokens/s "
            f"peak {report[name]['peak_gib']:.2f} GiB   time/ours {report[name]['time_over_ours']:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})   loss {results[name][0][1]:.3f} -> {results[name][-1][1]:.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
