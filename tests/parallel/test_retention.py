"""context.retain: the divergence from the frozen base on untouched samples, and its gradients, are transformers'."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from float64 import in_float64, widened
from parallel.cases import build, make_samples, micro_batches, recipe_for
from parallel.reference import EXACT, huggingface_loss, huggingface_model, rows_of
from small import ROOT, small_llama
from unit.starting import write_tokens

from endprompt_megatron.config.resolve import config_of_base
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.shape import read_shape

RETAIN = ["context.retain={weight: 0.7, every: 2}", "optim.grad_clip=0.5"]
STEPS = 4
LAYOUTS = {
    "tp1": (1, []),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "cp2-dp2": (4, ["parallel.context=2"]),
    "dp2-overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An odd vocabulary: padded inside for two tensor ranks."""
    directory = tmp_path_factory.mktemp("retention")
    small_llama(directory / "hf", vocab_size=321)
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    return directory, directory / "hf", directory / "megatron"


def train_steps(recipe, batches):
    """On a rank, of one update a batch: loss, divergence from the base (-1: not asked), gradient norm."""
    from endprompt_megatron.checkpoint.resume import initialise
    from endprompt_megatron.convert.direct import weights_to_start_from
    from endprompt_megatron.training.optimizer import update, zero_grad
    from endprompt_megatron.training.retention import Retention
    from endprompt_megatron.training.step import run_batch

    shape, models, optimizer, scheduler = build(recipe)
    retention = Retention(recipe, shape, config_of_base(recipe))
    initialise(weights_to_start_from(Path(recipe.model.init_from), shape, "test"), retention.models, None)
    seen = []
    for step, samples in enumerate(batches):
        zero_grad(models, optimizer)
        batch = retention.added_to(micro_batches(recipe, samples), step)
        losses = run_batch(models, batch, backward=True, retention=retention)
        norm, _ = update(optimizer, losses.total, recipe.optim.grad_clip)
        scheduler.step(increment=1)
        seen.append((losses.total, -1.0 if losses.retained is None else losses.retained, norm))
    return seen


def divergence(model, base, samples) -> torch.Tensor:
    """Mean KL(base || model) over the context targets of samples at their own positions, in nats, with its graph."""
    total, count = torch.zeros(()), 0
    for arrays in rows_of(samples):
        tokens = torch.from_numpy(arrays["tokens"])[None]
        counts = torch.from_numpy(~arrays["prompt_mask"] & (arrays["loss_weights"] > 0))
        given = {"attention_mask": torch.ones_like(tokens), "position_ids": torch.arange(tokens.shape[1])[None]}
        ours = model(tokens, use_cache=False, **given).logits[0].log_softmax(-1)
        with torch.no_grad():
            theirs = base(tokens, use_cache=False, **given).logits[0].log_softmax(-1)
        apart = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        total, count = total + (apart * counts).sum(), count + int(counts.sum())
    return total / count


def train_huggingface(recipe, batches) -> np.ndarray:
    """The same by transformers and torch's AdamW, [step, 3] float64."""
    from transformers import AutoModelForCausalLM

    model = huggingface_model(recipe, train=True)
    base = widened(AutoModelForCausalLM.from_pretrained(recipe.model.hf, dtype=torch.float32)).eval()
    o = recipe.optim
    decayed = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps)
    seen = []
    for step, samples in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = o.lr * min(step / o.warmup_steps, 1.0)
        adamw.zero_grad()
        total, *_ = huggingface_loss(model, samples)
        apart = None if step % recipe.context.retain.every else divergence(model, base, samples)
        (total if apart is None else total + recipe.context.retain.weight * apart).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        adamw.step()
        seen.append((total.item(), -1.0 if apart is None else apart.item(), norm.item()))
    return np.array(seen)


COVERED = {("tp2-sp", "end_prompt"), ("cp2-dp2", "pose"), ("dp2-overlap", "end_prompt")}
CASES = [
    pytest.param(layout, method, marks=[] if (layout, method) in COVERED else pytest.mark.full)
    for layout in LAYOUTS
    for method in ("end_prompt", "pose")
]


@pytest.mark.parametrize(("layout", "method"), CASES)
def test_retention_equals_divergence_by_transformers(ranks, model, layout, method):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*model, *keys, *RETAIN, f"context.method={method}", "context.rope.type=yarn")
    vocab = read_shape(recipe.model.hf).vocab_size
    batches = [make_samples(recipe, vocab, 8, seed=step) for step in range(STEPS)]
    expected = in_float64(train_huggingface, recipe, batches)
    assert (expected[::2, 1] > 1e-3).all()
    for seen in ranks.run(world, in_float64, train_steps, recipe, batches):
        np.testing.assert_allclose(seen, expected, rtol=EXACT)


def run_tool(directory: Path, *keys: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/extend.py"), "recipe.yaml", *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)


def steps_of(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line.get("loss_retained"), line["grad_norm"]) for line in lines]


def test_a_run_that_retains_resumes_to_the_last_bit_and_logs_its_divergence(model, tmp_path):
    directory, hf, megatron = model
    recipe_for(directory, hf, megatron)
    write_tokens(tmp_path / "train", 4000, below=300)
    (tmp_path / "recipe.yaml").write_text(
        (directory / "recipe.yaml").read_text().replace("train: none", "train: train")
    )
    keys = ["context.retain.weight=0.5", "context.retain.every=3", "train.steps=6", "context.prompts=[text:ab]"]
    whole = run_tool(tmp_path, *keys, "checkpoint.dir=whole")
    assert whole.returncode == 0, whole.stderr
    found = steps_of(tmp_path / "whole")
    assert [step for step, _, retained, _ in found if retained is not None] == [1, 4]
    assert "from the base 0." in whole.stdout
    first = run_tool(tmp_path, *keys, "checkpoint.dir=parts", "checkpoint.interval=2", "train.log_interval=1")
    assert first.returncode == 0, first.stderr
    # As if it had been killed after its second checkpoint.
    shutil.rmtree(tmp_path / "parts/checkpoints/iter_0000006")
    again = run_tool(tmp_path, *keys, "checkpoint.dir=parts", "checkpoint.interval=2")
    assert again.returncode == 0, again.stderr
    assert steps_of(tmp_path / "parts") == found
    other = run_tool(tmp_path, *keys, "checkpoint.dir=parts", "context.retain.every=2", "train.steps=8")
    assert other.returncode == 2
    assert "context.retain.every=2 but" in other.stderr
