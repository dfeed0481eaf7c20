"""The planner's time model compared with published training speeds, as a Markdown table.

    python benchmarks/plan.py

benchmarks/plan.md says where the figures come from and how they are read.
"""

import sys
from dataclasses import replace
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import of_kind
from endprompt_megatron.model.flops import flops_per_token
from endprompt_megatron.model.published_shapes import published_config
from endprompt_megatron.model.shape import ModelShape, shape_of
from endprompt_megatron.plan.plan import Estimate, estimate
from endprompt_megatron.plan.step_time import EFFICIENCY

# Attention of the container of the long sequences, at any length.
KERNELS_OF_2024 = replace(EFFICIENCY, attention=0.36, short_attention=0.0)
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published_speeds.yaml").read_text())


def predicted(row: dict) -> Estimate:
    """The planner's estimate of a published run."""
    recipe = Recipe()
    recipe.context.physical = row["length"]
    recipe.train.steps = 1
    recipe.train.global_batch_size = row["batch"]
    recipe.train.micro_batch_size = row.get("micro", 1)
    p = recipe.parallel
    p.tensor, p.pipeline, p.context = row.get("tensor", 1), row.get("pipeline", 1), row.get("context", 1)
    p.virtual_pipeline = row.get("virtual")
    p.sequence = p.overlap_tensor = p.tensor > 1
    p.count_embedding = p.count_loss = row.get("count", False)
    if "recompute_layers" in row:
        p.recompute, p.recompute_layers = "block", row["recompute_layers"]
    recipe.precision.grad_reduce = "bfloat16"
    if row.get("fp8"):
        recipe.precision.fp8, recipe.precision.fp8_recipe = "hybrid", "tensorwise"
    efficiency = KERNELS_OF_2024 if row["source"] == "nemo-24.03" else EFFICIENCY
    gpu = of_kind(row.get("gpu", "h100")).gpu
    return estimate(_shape(row), recipe, gpu, row["gpus"], efficiency=efficiency)


def published_tokens(row: dict) -> float:
    """Published tokens/s a GPU; from TFLOP/s by the FLOPs that the source counted."""
    if "tokens_per_s" in row:
        return float(row["tokens_per_s"])
    shape, length = _shape(row), row["length"]
    causal = flops_per_token(shape, length)
    # The other half of the square.
    square = causal + 6 * shape.num_layers * shape.num_heads * shape.head_dim * length
    return row["tflops"] * 1e12 / square


def _shape(row: dict) -> ModelShape:
    return shape_of(published_config(row["model"]), row["model"])


def main() -> None:
    print("| run | GPUs | layout | precision | published tokens/s per GPU | predicted | difference | source |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | --- |")
    for row in PUBLISHED["rows"]:
        found, known = predicted(row), published_tokens(row)
        p = found.recipe.parallel
        virtual = f" VP{p.virtual_pipeline}" if p.virtual_pipeline else ""
        layout = f"TP{p.tensor} PP{p.pipeline}{virtual} CP{p.context} DP{found.replicas}"
        name = f"**{row['name']}**" if row.get("main") else row["name"]
        print(
            f"| {name} | {row['gpus']} {found.gpu.name} | {layout} | {'FP8' if row.get('fp8') else 'BF16'} "
            f"| {known:,.0f} | {found.tokens_per_gpu_second:,.0f} | {found.tokens_per_gpu_second / known - 1:+.1%} "
            f"| {row['source']} |"
        )


if __name__ == "__main__":
    main()
