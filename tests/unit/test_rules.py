"""Which recipes are legal where: layouts and precisions of real model shapes on GPUs that need not be here."""

from dataclasses import replace
from pathlib import Path

import pytest

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints.check import check_for
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.distributed.hardware import GPUS, Hardware, of_kind
from endprompt_megatron.distributed.pipeline import chunk_layers
from endprompt_megatron.distributed.te import attention_environment
from endprompt_megatron.model.shape import ModelShape, shape_of

BASE = """
model: {hf: model, init_from: megatron}
context: {original: 8192, target: 65536, physical: 8192}
data: {train: train}
train: {steps: 100, global_batch_size: 64}
checkpoint: {dir: run}
"""
H100, H200, A100, B200 = (of_kind(kind) for kind in ("h100", "h200", "a100", "b200"))
CPU = Hardware(None, None)
BARE = Hardware(GPUS["h100"], None)  # a GPU without Transformer Engine
OLD = Hardware(GPUS["h100"], (2, 3))


def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int = 128256) -> ModelShape:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
    }
    return shape_of(config, "model")


SHAPES = {
    "135m": llama(30, 576, 1536, 9, 3, 49152),
    "1b": llama(16, 2048, 8192, 32, 8),
    "8b": llama(32, 4096, 14336, 32, 8),
    "70b": llama(80, 8192, 28672, 64, 8),
    "405b": llama(126, 16384, 53248, 128, 8),
}
TP2 = ["parallel.tensor=2", "parallel.sequence=true"]
FP8 = ["precision.fp8=hybrid"]
DOCUMENTS = ["data.packing=documents"]
CURRENT = [*FP8, "precision.fp8_recipe=tensorwise"]
ATTENTION = [*FP8, "precision.fp8_attention=true"]
RETAIN = ["context.retain.weight=1"]
SHIFTED = ["longlora.shifted=true"]
LORA = ["longlora.rank=8"]
PROBED = ["data.valid=99,1", "train.virtual_distances=[65536]"]
A2A = ["parallel.context_comm=a2a"]
B405 = ["parallel.tensor=8", "parallel.sequence=true", "parallel.pipeline=8"]
COUNTED = ["parallel.count_embedding=true", "parallel.count_loss=true"]

# name: (shape, hardware, number of GPUs, overrides)
LEGAL = {
    "8b-bf16": ("8b", H100, 8, TP2),
    "8b-on-cpus": ("8b", CPU, 8, TP2),
    "8b-without-te": ("8b", BARE, 8, TP2),
    "8b-context": ("8b", H100, 8, [*TP2, "parallel.context=4"]),
    "8b-context-a2a": ("8b", H100, 8, [*TP2, "parallel.context=4", "parallel.context_comm=a2a"]),
    "8b-context-on-cpus": ("8b", CPU, 8, ["parallel.context=8", "parallel.context_comm=all_gather"]),
    "8b-packed": ("8b", H100, 8, [*TP2, *DOCUMENTS, "train.micro_batch_size=2"]),
    "8b-packed-fp8": ("8b", H100, 8, [*TP2, *FP8, *DOCUMENTS]),
    "8b-packed-context": ("8b", H100, 8, [*TP2, *DOCUMENTS, "parallel.context=4"]),
    "8b-packed-aligned": ("8b", H100, 8, [*DOCUMENTS, "parallel.context=2", "data.align=16"]),
    "8b-packed-a2a": ("8b", Hardware(GPUS["h100"], (2, 13)), 8, [*DOCUMENTS, "parallel.context=2", *A2A]),
    "8b-packed-on-cpus": ("8b", CPU, 8, [*DOCUMENTS, "precision.dtype=float32", "parallel.context=2", *A2A]),
    "8b-fp8-delayed": ("8b", H100, 8, [*TP2, *FP8]),
    "8b-fp8-tensorwise": ("8b", H100, 8, [*TP2, *CURRENT]),
    "8b-fp8-blockwise": ("8b", H100, 8, [*TP2, *FP8, "precision.fp8_recipe=blockwise"]),
    "8b-fp8-mxfp8-on-blackwell": ("8b", B200, 8, [*TP2, *FP8, "precision.fp8_recipe=mxfp8"]),
    "8b-e4m3": ("8b", H100, 8, [*TP2, "precision.fp8=e4m3"]),
    "8b-fp8-attention": ("8b", H100, 8, [*TP2, *ATTENTION]),
    "8b-fp8-attention-current": ("8b", H100, 8, [*TP2, *ATTENTION, "precision.fp8_recipe=tensorwise"]),
    "8b-fp8-attention-context": ("8b", H100, 8, [*TP2, *ATTENTION, "parallel.context=4"]),
    "8b-fp8-attention-full-recompute": ("8b", H100, 8, [*TP2, *ATTENTION, "parallel.recompute=full"]),
    "8b-fp8-edges": ("8b", H100, 8, [*TP2, *CURRENT, "precision.bf16_edge_layers=1"]),
    "8b-bf16-gradients": ("8b", A100, 8, [*TP2, "precision.grad_reduce=bfloat16"]),
    "8b-small-moments": ("8b", H100, 8, [*TP2, "optim.moments_dtype=bfloat16"]),
    "8b-retain": ("8b", H100, 8, [*TP2, *RETAIN, *FP8, "parallel.context=2", "context.retain.every=4"]),
    "8b-overlap": ("8b", H100, 8, [*TP2, "parallel.overlap_tensor=true"]),
    "8b-block": ("8b", H100, 8, [*TP2, "parallel.recompute=block", "parallel.recompute_layers=8"]),
    "1b-fp8-gemms": ("1b", H100, 8, FP8),
    "1b-fp8-attention-on-blackwell": ("1b", B200, 8, ATTENTION),
    "135m-tp3": ("135m", CPU, 3, ["parallel.tensor=3", "train.global_batch_size=4"]),
    "70b-virtual": (
        "70b",
        H100,
        32,
        ["parallel.tensor=4", "parallel.sequence=true", "parallel.pipeline=4", "parallel.virtual_pipeline=5"],
    ),
    "8b-longlora": ("8b", H100, 8, [*TP2, *SHIFTED, *LORA]),
    "8b-longlora-on-cpus": ("8b", CPU, 8, [*TP2, *SHIFTED, *LORA, "longlora.train_norms=false"]),
    "8b-shifted-alone": ("8b", H100, 8, [*TP2, *FP8, *SHIFTED, "parallel.overlap_tensor=true"]),
    "8b-lora-alone": ("8b", H100, 8, [*TP2, *LORA, *DOCUMENTS, "parallel.context=4"]),
    "135m-longlora": ("135m", CPU, 1, [*SHIFTED, *LORA, "context.method=full", "context.physical=65536"]),
    "405b-counted": ("405b", H100, 512, [*B405, "parallel.virtual_pipeline=8", *COUNTED, "parallel.context=2"]),
}
# name: (shape, hardware, number of GPUs, overrides, what the line says)
ILLEGAL = {
    "shifted-context": ("8b", H100, 8, [*SHIFTED, "parallel.context=2"], ["parallel.context=2", "several ranks"]),
    "shifted-packed": ("8b", H100, 8, [*SHIFTED, *DOCUMENTS], ["data.packing=documents", "use stream"]),
    "shifted-fp8-attention": ("8b", H100, 8, [*SHIFTED, *ATTENTION], ["precision.fp8_attention=true", "use false"]),
    "shifted-length": ("8b", H100, 8, [*SHIFTED, "context.physical=8188"], ["context.physical=8188", "groups=8"]),
    "shifted-one-group": ("8b", H100, 8, [*SHIFTED, "longlora.groups=1"], ["longlora.groups=1", "at least 2"]),
    "groups-alone": ("8b", H100, 8, ["longlora.groups=8"], ["longlora.groups=8", "longlora.shifted=true"]),
    "lora-fp8": ("8b", H100, 8, [*TP2, *LORA, *FP8], ["longlora.rank=8", "precision.fp8=hybrid", "use null"]),
    "lora-overlap": ("8b", H100, 8, [*TP2, *LORA, "parallel.overlap_tensor=true"], ["overlap_tensor=true", "frozen"]),
    "retain-pipeline": (
        *("8b", H100, 8, [*RETAIN, "parallel.pipeline=2"]),
        ["context.retain.weight=1.0", "parallel.pipeline=2", "use parallel.pipeline=1"],
    ),
    "retain-length": (
        *("8b", H100, 8, [*TP2, *RETAIN, "context.physical=16384"]),
        ["context.retain.weight=1.0", "context.physical=16384", "8192 tokens", "at most that"],
    ),
    "retain-packed": (
        *("8b", H100, 8, [*TP2, *RETAIN, *DOCUMENTS]),
        ["context.retain.weight=1.0", "data.packing=documents", "use data.packing=stream"],
    ),
    "retain-from-nothing": (
        *("8b", H100, 8, [*TP2, *RETAIN, "model.init_from=null"]),
        ["context.retain.weight=1.0", "give model.init_from"],
    ),
    "retain-never": ("8b", H100, 8, [*TP2, "context.retain.every=4"], ["context.retain.weight is 0", "every=4"]),
    "overlap-blockwise": (
        *("8b", H100, 8, [*TP2, *FP8, "precision.fp8_recipe=blockwise", "parallel.overlap_tensor=true"]),
        ["overlap_tensor=true", "fp8_recipe=blockwise", "use tensorwise"],
    ),
    "overlap-probe-rows": (
        *("8b", H100, 8, [*TP2, "parallel.overlap_tensor=true", "train.micro_batch_size=2", *PROBED]),
        ["train.micro_batch_size=2", "train.virtual_distances", "overlap_tensor=false"],
    ),
    "deterministic-overlap": (
        *("8b", H100, 8, [*TP2, "parallel.overlap_tensor=true", "train.deterministic=true"]),
        ["overlap_tensor=true", "train.deterministic=true", "overlap_tensor=false"],
    ),
    "deterministic-fp8-attention": (
        *("8b", H100, 8, [*ATTENTION, "train.deterministic=true"]),
        ["precision.fp8_attention=true", "train.deterministic=true", "use false"],
    ),
    "mlp-alone": ("8b", H100, 8, ["longlora.mlp=true"], ["longlora.mlp=true", "longlora.rank=0", "set a rank"]),
    "save-frozen-alone": ("8b", H100, 8, ["longlora.save_frozen=false"], ["longlora.save_frozen=false", "rank=0"]),
    "frozen-norms-alone": ("8b", H100, 8, ["longlora.train_norms=false"], ["longlora.train_norms=false", "rank"]),
    "tensor-heads": ("8b", H100, 16, ["parallel.tensor=16"], ["num_key_value_heads=8", "1, 2, 4 or 8"]),
    "tensor-small": ("135m", CPU, 2, ["parallel.tensor=2"], ["num_key_value_heads=3", "use 1 or 3"]),
    "pipeline-126": ("405b", H100, 64, B405, ["126", "parallel.count_embedding=true and count_loss=true (128 layers)"]),
    "pipeline-counted-in-vain": (
        "8b",
        H100,
        8,
        ["parallel.pipeline=4", *COUNTED],
        ["num_hidden_layers=32 + embedding + loss = 34", "leave out"],
    ),
    "pipeline-one-more": (
        "8b",
        H100,
        3,
        ["parallel.pipeline=3", "train.global_batch_size=3"],
        ["parallel.count_loss=true (33 layers)"],
    ),
    "counted-alone": ("8b", H100, 8, COUNTED, ["parallel.count_embedding=true", "parallel.pipeline above 1"]),
    "virtual": ("70b", H100, 32, ["parallel.pipeline=4", "parallel.virtual_pipeline=3"], ["20 layers", "1, 2, 4, 5"]),
    "virtual-empty": (
        "405b",
        H100,
        512,
        [*B405, "parallel.virtual_pipeline=16", *COUNTED],
        ["parallel.virtual_pipeline=16", "no layer"],
    ),
    "virtual-batch": (
        "70b",
        H100,
        32,
        ["parallel.pipeline=4", "parallel.virtual_pipeline=5", "train.global_batch_size=16"],
        ["2 micro-batches", "multiple of parallel.pipeline=4"],
    ),
    "sequence-alone": ("8b", H100, 8, ["parallel.sequence=true"], ["parallel.tensor above 1"]),
    "overlap-alone": (
        "8b",
        H100,
        8,
        ["parallel.tensor=2", "parallel.overlap_tensor=true"],
        ["overlap_tensor", "parallel.sequence=true"],
    ),
    "overlap-on-cpus": ("8b", CPU, 8, [*TP2, "parallel.overlap_tensor=true"], ["overlap_tensor", "Transformer Engine"]),
    "gather-without-reduce": (
        "8b",
        H100,
        8,
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=false"],
        ["overlap_param_gather=true", "overlap_grad_reduce"],
    ),
    "context-odd": ("8b", H100, 8, ["parallel.context=8", "context.physical=8200"], ["8200", "16"]),
    "context-comm": ("8b", H100, 8, ["parallel.context_comm=ring"], ["ring", "p2p, all_gather, a2a"]),
    "context-a2a-heads": (
        "8b",
        H100,
        32,
        ["parallel.tensor=8", "parallel.context=4", "parallel.context_comm=a2a"],
        ["1 key-value heads", "parallel.context=4", "use p2p"],
    ),
    "context-dynamic": (
        "8b",
        H100,
        8,
        ["parallel.context=2", "context.rope.type=dynamic"],
        ["dynamic", "parallel.context=1"],
    ),
    "recompute-word": ("8b", H100, 8, ["parallel.recompute=all"], ["none, selective, block, full"]),
    "recompute-block-how-many": ("8b", H100, 8, ["parallel.recompute=block"], ["recompute_layers is missing"]),
    "recompute-too-many": (
        "8b",
        H100,
        8,
        ["parallel.recompute=block", "parallel.recompute_layers=33"],
        ["33", "the 32 layers of a stage"],
    ),
    "recompute-unit": (
        "8b",
        H100,
        8,
        ["parallel.recompute=full", "parallel.recompute_layers=3"],
        ["recompute_layers=3", "the 32 layers of a stage"],
    ),
    "recompute-layers-alone": ("8b", H100, 8, ["parallel.recompute_layers=2"], ["recompute_layers=2", "leave it out"]),
    "world": ("8b", H100, 6, ["parallel.tensor=4"], ["the 6 processes", "multiple of 4"]),
    "batch": ("8b", H100, 24, [], ["train.global_batch_size=64", "1 x 24"]),
    "fp8-on-cpus": ("8b", CPU, 8, FP8, ["precision.fp8=hybrid", "Transformer Engine", "use null"]),
    "fp8-without-te": ("8b", BARE, 8, FP8, ["Transformer Engine", "not installed"]),
    "fp8-without-gpu": ("8b", Hardware(None, (2, 13)), 8, FP8, ["needs a GPU"]),
    "fp8-on-ampere": ("8b", A100, 8, FP8, ["an A100 has no FP8"]),
    "fp8-format": ("8b", H100, 8, ["precision.fp8=e5m2"], ["e5m2", "hybrid, e4m3"]),
    "fp8-recipe": ("8b", H100, 8, [*FP8, "precision.fp8_recipe=current"], ["current", "delayed, tensorwise"]),
    "fp8-float32": ("8b", H100, 8, [*FP8, "precision.dtype=float32"], ["dtype=bfloat16"]),
    "te-too-old": ("8b", OLD, 8, [], ["Transformer Engine 2.3", "2.9 or later"]),
    "mxfp8-on-hopper": ("8b", H100, 8, [*FP8, "precision.fp8_recipe=mxfp8"], ["needs Blackwell", "H100", "tensorwise"]),
    "edges-delayed": ("8b", H100, 8, [*FP8, "precision.bf16_edge_layers=1"], ["fp8_recipe=delayed", "tensorwise"]),
    "edges-without-fp8": ("8b", H100, 8, ["precision.bf16_edge_layers=1"], ["precision.fp8", "use 0"]),
    "edges-too-many": (
        "8b",
        H100,
        8,
        [*CURRENT, "precision.bf16_edge_layers=9", "parallel.pipeline=4"],
        ["9 is more than the 8 layers"],
    ),
    "fp8-dimensions": (
        "135m",
        H100,
        3,
        [*FP8, "precision.fp8_recipe=blockwise", "train.global_batch_size=3"],
        ["multiples of 128", "576"],
    ),
    "fp8-tokens": ("8b", H100, 8, [*TP2, *FP8, "context.physical=8200"], ["multiples of 8", "4100", "multiple of 16"]),
    "attention-without-fp8": ("8b", H100, 8, ["precision.fp8_attention=true"], ["needs precision.fp8"]),
    "attention-head-dim": ("1b", H100, 8, ATTENTION, ["head_dim=128 alone", "64", "use false"]),
    "attention-blockwise": ("8b", H100, 8, [*ATTENTION, "precision.fp8_recipe=blockwise"], ["blockwise", "tensorwise"]),
    "attention-mxfp8": ("8b", B200, 8, [*ATTENTION, "precision.fp8_recipe=mxfp8"], ["mxfp8", "per-tensor scaling"]),
    "packed-a2a": ("8b", H100, 8, [*DOCUMENTS, *A2A, "parallel.context=2"], ["context_comm=a2a", "2.10", "2.9", "p2p"]),
    "packed-all-gather": (
        "8b",
        H100,
        8,
        [*DOCUMENTS, "parallel.context_comm=all_gather", "parallel.context=2"],
        ["context_comm=all_gather", "2.18", "p2p"],
    ),
    "packed-float32": ("8b", H100, 8, [*DOCUMENTS, "precision.dtype=float32"], ["precision.dtype=float32", "bfloat16"]),
    "packed-align": (
        "8b",
        H100,
        8,
        [*DOCUMENTS, "parallel.context=4", "data.align=4"],
        ["data.align=4", "2 x parallel.context=8", "two chunks"],
    ),
    "attention-packed": ("8b", H100, 8, [*ATTENTION, "data.packing=documents"], ["packing=documents"]),
    "attention-selective": (
        "8b",
        H100,
        8,
        [*ATTENTION, "parallel.recompute=selective"],
        ["recompute=selective", "full, block or none"],
    ),
    "attention-all-gather": (
        "8b",
        H100,
        8,
        [*ATTENTION, "parallel.context=2", "parallel.context_comm=all_gather"],
        ["all_gather", "p2p or a2a"],
    ),
    "moments-without-te": ("8b", BARE, 8, ["optim.moments_dtype=fp8"], ["optim.moments_dtype=fp8", "float32"]),
    "moments-word": ("8b", H100, 8, ["optim.moments_dtype=int8"], ["int8", "float32, bfloat16, fp8"]),
    "gradients-float32": (
        "8b",
        H100,
        8,
        ["precision.grad_reduce=bfloat16", "precision.dtype=float32"],
        ["grad_reduce=bfloat16", "float32"],
    ),
    "gradients-word": ("8b", H100, 8, ["precision.grad_reduce=fp8"], ["grad_reduce=fp8", "float32, bfloat16"]),
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(BASE)
    return lambda overrides: load_recipe("recipe.yaml", overrides)


@pytest.mark.parametrize("case", LEGAL)
def test_recipe_is_legal(recipe, case):
    shape, hardware, gpus, overrides = LEGAL[case]
    check_for(recipe(overrides), "recipe.yaml", SHAPES[shape], world_size=gpus, hardware=hardware)


@pytest.mark.parametrize("case", ILLEGAL)
def test_recipe_is_refused_in_one_line(recipe, case):
    shape, hardware, gpus, overrides, needles = ILLEGAL[case]
    with pytest.raises(InputError) as refused:
        check_for(recipe(overrides), "recipe.yaml", SHAPES[shape], world_size=gpus, hardware=hardware)
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith("recipe.yaml: ")
    assert all(needle in line for needle in needles), line


def test_fp8_attention_of_current_scaling_is_delayed_on_hopper_alone(recipe):
    current = recipe([*ATTENTION, "precision.fp8_recipe=tensorwise"])
    assert attention_environment(current, H100) == {"NVTE_DPA_FP8_RECIPE": "DelayedScaling"}
    assert attention_environment(current, H200) == {"NVTE_DPA_FP8_RECIPE": "DelayedScaling"}
    assert attention_environment(current, B200) == {}
    assert attention_environment(recipe(ATTENTION), H100) == {}


@pytest.mark.parametrize(
    ("layers", "pipeline", "virtual", "counted", "expected"),
    [
        (32, 4, None, (False, False), [[8], [8], [8], [8]]),
        (80, 4, 5, (False, False), [[4] * 5] * 4),
        (126, 8, 8, (True, True), [[1] + [2] * 7, *[[2] * 8] * 6, [2] * 7 + [1]]),
        (31, 4, None, (False, True), [[8], [8], [8], [7]]),
    ],
)
def test_pipeline_stages_get_their_layers(recipe, layers, pipeline, virtual, counted, expected):
    parallel = replace(
        recipe([]).parallel,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        count_embedding=counted[0],
        count_loss=counted[1],
    )
    found = chunk_layers(layers, parallel)
    assert found == expected
    assert sum(map(sum, found)) == layers
