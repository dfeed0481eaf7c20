"""A step on a GPU: the host does not wait inside it, memory is what was planned, and RoPE's angles are right."""

import fcntl
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel.cases import build, exported, make_samples, micro_batches, recipe_for

from benchmarks.gpu_contenders import CONFIG
from endprompt_megatron.config.constraints.check import load_checked
from endprompt_megatron.config.resolve import config_to_export
from endprompt_megatron.model.shape import read_shape

LONG = ["context.physical=256", "context.target=1024", "precision.dtype=bfloat16"]


def waits_of_a_step(recipe, samples) -> list[str]:
    """On a rank: the lines at which the host waited for the GPU in forward and backward, after two steps to warm up."""
    from functools import partial

    from endprompt_megatron.distributed import te
    from endprompt_megatron.distributed.hardware import here

    te.set_environment(recipe, "test", here())
    from endprompt_megatron.training import step

    _, models, _, _ = build(recipe)
    batches = micro_batches(recipe, samples)
    for _ in range(2):
        step.run_batch(models, batches, backward=True)
    total = torch.ones((), dtype=torch.float64, device="cuda")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step._schedule(models, batches, partial(step._loss, total=total), forward_only=False)
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]


KEYS = {
    "bfloat16": [],
    "recomputed": ["parallel.recompute=full"],
    "positions-by-sample": ["context.method=end_prompt_random", "train.micro_batch_size=4"],
    "tensorwise": ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"],
    "delayed": ["precision.fp8=hybrid"],
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.fp8, pytest.mark.with_te] if "fp8" in str(KEYS[c]) else []) for c in KEYS],
)
def test_the_host_does_not_wait_for_the_gpu_in_forward_and_backward(fresh_rank, model, case):
    recipe = recipe_for(*model, *LONG, *KEYS[case])
    samples = make_samples(recipe, read_shape(recipe.model.hf).vocab_size, 8)
    (waits,) = fresh_rank.run(1, waits_of_a_step, recipe, samples)
    assert set(waits) == set()


def memory_of_a_step(path, overrides) -> tuple[int, int, float]:
    """On a rank: the peak of what torch allocated over the third of three steps, what it reserved, and the plan's."""
    from endprompt_megatron.distributed import runtime, te
    from endprompt_megatron.distributed.hardware import here, te_version

    recipe, shape = load_checked(path, overrides, world_size=1)
    te.set_environment(recipe, "test", here())
    runtime.start(1, 1, None, 1, seed=0)
    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.plan.memory import memory
    from endprompt_megatron.training.optimizer import build_optimizer, update, wrap_models, zero_grad
    from endprompt_megatron.training.step import run_batch

    models = wrap_models(
        build_model(shape, recipe, config_to_export(recipe, shape, "test")), recipe.parallel, recipe.precision
    )
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer, _ = build_optimizer(models, recipe.optim, recipe.precision, recipe.train.steps)
    optimizer.reload_model_params()
    batches = micro_batches(recipe, make_samples(recipe, shape.vocab_size, recipe.train.global_batch_size))
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        zero_grad(models, optimizer)
        losses = run_batch(models, batches, backward=True)
        update(optimizer, losses.total, 1.0)
    (planned,) = memory(shape, recipe, 1, te=te_version() is not None)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), planned.allocated


@pytest.fixture
def half_of_the_gpu():
    """One test at a time that takes so much, whoever runs them side by side."""
    with open(Path(tempfile.gettempdir()) / "endprompt-half-of-the-gpu", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


MEMORY = {
    "bfloat16": [],
    "recomputed": ["parallel.recompute=full"],
    "tensorwise": KEYS["tensorwise"],
    "low-precision-moments": ["optim.moments_dtype=bfloat16"],
}


@pytest.mark.with_te
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.fp8 if "fp8" in str(MEMORY[c]) else []) for c in MEMORY]
)
def test_a_step_takes_the_memory_that_was_planned(fresh_rank, half_of_the_gpu, tmp_path, record_property, case):
    """LLaMA-3-8B's sizes, four layers: 43 GiB by the plan.  Within 3%, as the dry run is."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 4}))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{hf: {tmp_path}}}\ncontext: {{target: 65536, physical: 8192}}\ndata: {{train: none}}\n"
        f"train: {{steps: 100, global_batch_size: 2}}\ncheckpoint: {{dir: {tmp_path}/run}}\n"
    )
    (found,) = fresh_rank.run(1, memory_of_a_step, tmp_path / "recipe.yaml", MEMORY[case])
    for name, value in zip(("peak", "reserved", "planned"), found, strict=True):
        record_property(f"{name}_gib", round(value / 2**30, 2))
    assert found[0] == pytest.approx(found[2], rel=0.03)


def angles_at(recipe, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """On a rank: cos and sin on the GPU of these positions' angles, [n, d/2] each, and the frequencies."""
    from endprompt_megatron.distributed import runtime
    from endprompt_megatron.method.rope import PositionRotary, transformers_config

    runtime.start(1, 1, None, 1, seed=0)
    rotary = PositionRotary(transformers_config(exported(recipe)), 128)
    angles = rotary.rotary_angles(torch.tensor(positions, device="cuda")[None])[:, 0, 0, :64]
    return torch.stack((angles.cos(), angles.sin())).double().cpu().numpy(), rotary.inv_freq.double().cpu().numpy()


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_rotary_angles_half_a_million_tokens_away_are_those_of_float64(rank, model, rope):
    """A float32 angle of that size is off by up to 1/64; a frequency or position rounded to BF16 by thousands."""
    recipe = recipe_for(*model, *LONG, f"context.rope.type={rope}", "context.target=524288")
    positions = [0, 1, 255, 8191, 65535, 262143, 524287]
    found, frequencies = rank.run(1, angles_at, recipe, positions)[0]
    expected = np.outer(positions, frequencies)
    assert np.abs(found - np.stack((np.cos(expected), np.sin(expected)))).max() < 0.035
    assert np.abs(found[:, :4] - np.stack((np.cos(expected), np.sin(expected)))[:, :4]).max() < 1e-3
