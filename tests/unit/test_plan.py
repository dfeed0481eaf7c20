"""What a plan says, against counts by hand, published formulas and published speeds.

Memory beside what real models hold is in tests/parallel/test_plan_memory.py.
"""

import pytest
from unit.test_shape import MODELS, config

from benchmarks.plan import PUBLISHED, predicted, published_tokens
from endprompt_megatron.config.recipe import Recipe, Retain
from endprompt_megatron.distributed.hardware import of_kind
from endprompt_megatron.model.flops import flops_per_token
from endprompt_megatron.model.published_shapes import published_config, published_configs
from endprompt_megatron.model.shape import shape_of
from endprompt_megatron.plan.estimate import estimate
from endprompt_megatron.plan.memory import layer_activations, memory, peak_in_flight


def test_flops_of_a_tiny_model_by_hand():
    shape = shape_of(config(8, 12, 2, 4, 2, 100), "config.json")
    # q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 12; two layers; the output layer 8 x 100
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 96) + 800
    # a causal token of 16 sees 8 on average: scores and values, two operations each, 4 heads of 2, two layers
    attention = 2 * (2 * 2 * 8 * 8)
    assert flops_per_token(shape, 16) == 3 * (2 * weights + attention)


@pytest.mark.parametrize(("length", "gflop"), [(8192, 51.5), (65536, 96.6)])
def test_flops_of_llama3_8b_agree_with_the_published(length, gflop):
    """NVIDIA's 744 TFLOP/s at 14,451 tokens/s and length 8192 is 51.5 GFLOP a token."""
    shape = shape_of(MODELS["LLaMA-3-8B"][0], "config.json")
    assert flops_per_token(shape, length) / 1e9 == pytest.approx(gflop, abs=0.05)


def test_tied_embeddings_do_not_save_the_flops_of_the_output_layer():
    untied = shape_of(config(8, 12, 2, 4, 2, 100), "config.json")
    tied = shape_of(config(8, 12, 2, 4, 2, 100, tie_word_embeddings=True), "config.json")
    assert flops_per_token(tied, 16) == flops_per_token(untied, 16)


def _row_name(row: dict) -> str:
    return f"{row['name']}-{row.get('gpu', 'h100')}x{row['gpus']}-{'fp8' if row.get('fp8') else 'bf16'}-{row['source']}"


@pytest.mark.parametrize("row", PUBLISHED["rows"], ids=_row_name)
def test_published_speeds_are_predicted_within_fifteen_percent(row):
    """One set of efficiencies for all of them."""
    assert predicted(row).tokens_per_gpu_second == pytest.approx(published_tokens(row), rel=0.15)


@pytest.mark.parametrize("row", [row for row in PUBLISHED["rows"] if "recompute_layers" not in row], ids=_row_name)
def test_every_published_run_fits_its_gpus(row):
    """They ran.  The one that recomputes layers also shards its weights, which is not planned for."""
    found = predicted(row)
    assert found.fits
    assert found.fullest.total > 0.25 * found.gpu.memory_gib * 2**30


def test_published_tflops_of_2024_count_the_complete_attention_square():
    """NeMo's row of LLaMA2-7B at 4096 tokens, 776 TFLOP/s at 16,847 tokens/s, is not the causal half."""
    (row,) = [row for row in PUBLISHED["rows"] if row["source"] == "nemo-24.07" and row["model"] == "llama-2-7b"]
    by_flops = {key: value for key, value in row.items() if key != "tokens_per_s"} | {"tflops": 776}
    assert published_tokens(by_flops) == pytest.approx(row["tokens_per_s"], rel=0.001)


def layout(**parallel) -> Recipe:
    recipe = Recipe()
    recipe.context.original, recipe.context.physical, recipe.train.steps = 8192, 8192, 10
    for key, value in parallel.items():
        setattr(recipe.parallel, key, value)
    return recipe


def test_activations_of_a_layer_follow_korthikanti_et_al():
    """34 s b h bytes without scores, less the two dropout masks: for a GELU layer of ffn 4 h, sharded by TP and SP."""
    hidden, heads, tensor = 4096, 32, 4
    shape = shape_of(config(hidden, 4 * hidden, 32, heads, heads, 32000), "config.json")
    recipe = layout(tensor=tensor, sequence=True)
    tokens = recipe.context.physical
    gate = 2 * tokens * 4 * hidden / tensor  # SwiGLU's second half, which GELU does not have
    statistics = tokens * (4 * heads + 8) / tensor  # of norms and softmax, which they leave out
    assert layer_activations(shape, recipe) - gate - statistics == 32 * tokens * hidden / tensor


@pytest.mark.parametrize(("stage", "held"), [(0, 4), (1, 3), (3, 1)])
def test_1f1b_holds_one_micro_batch_for_each_stage_from_this_one_on(stage, held):
    parallel = layout(pipeline=4).parallel
    assert peak_in_flight(stage, parallel, 16, [10.0]) == (10.0 * held, held)
    assert peak_in_flight(stage, parallel, 2, [10.0])[1] == min(held, 2)


@pytest.mark.parametrize(("pipeline", "virtual"), [(4, 5), (8, 5), (8, 8), (2, 16)])
def test_virtual_stages_increase_activations_by_the_published_factor(pipeline, virtual):
    """Korthikanti et al., section 4.2.3: the first stage of an interleaved schedule holds 1 + (p - 1) / (p m)."""
    parallel = layout(pipeline=pipeline, virtual_pipeline=virtual).parallel
    _, held = peak_in_flight(0, parallel, 64, [1.0] * virtual)
    assert held == pytest.approx(pipeline * (1 + (pipeline - 1) / (pipeline * virtual)))


def test_a_stage_holds_no_more_micro_batches_than_the_step_has():
    parallel = layout(pipeline=4, virtual_pipeline=2).parallel
    assert peak_in_flight(0, parallel, 4, [1.0, 1.0])[1] == pytest.approx(4.0, abs=1.0)
    assert peak_in_flight(0, parallel, 4, [1.0, 1.0])[1] <= 4


def test_recompute_trades_memory_for_time():
    shape = shape_of(published_config("llama-3-8b"), "llama")
    gpu = of_kind("h100").gpu
    none, some, full = (
        estimate(shape, layout(tensor=2, sequence=True, **keys), gpu, 8)
        for keys in ({}, {"recompute": "block", "recompute_layers": 16}, {"recompute": "full"})
    )
    kept = [e.stages[0].activations for e in (none, some, full)]
    assert kept[2] == 32 * 8192 * 4096 * 2 / 2  # each layer's input
    assert kept[1] == pytest.approx((kept[0] + kept[2]) / 2)
    assert none.step_seconds < some.step_seconds < full.step_seconds
    assert full.work.attention == pytest.approx(none.work.attention * 4.5 / 3.5)
    assert full.tflops < none.tflops  # model FLOPs: what is done twice counts once


def test_a_frozen_base_costs_its_weights_and_logits_and_a_share_of_the_time():
    from dataclasses import replace

    shape, gpu = shape_of(published_config("llama-3-8b"), "llama"), of_kind("h100").gpu
    plain, retained = layout(tensor=2, sequence=True), layout(tensor=2, sequence=True)
    retained.context = replace(retained.context, retain=Retain(weight=1.0, every=2))
    without, held = (estimate(shape, recipe, gpu, 8) for recipe in (plain, retained))
    assert held.stages[0].weights == 2 * without.stages[0].weights
    assert held.stages[0].logits - without.stages[0].logits == 8192 * 2 * shape.vocab_size / 2
    assert held.stages[0].optimizer == without.stages[0].optimizer
    for kind in ("gemm", "attention"):  # every second step: the base forward, the model forward and back
        assert getattr(held.work, kind) == pytest.approx(getattr(without.work, kind) * (1 + 4 / 3 / 2))


def test_optimizer_memory_is_divided_by_data_and_context_parallel_ranks():
    shape = shape_of(published_config("llama-3-8b"), "llama")
    alone, shared = (memory(shape, layout(context=c), gpus)[0] for c, gpus in ((1, 1), (2, 8)))
    assert alone.optimizer == 8 * shared.optimizer == shape.parameters * 12
    assert alone.weights == shared.weights
    assert alone.gradients == shared.gradients == 2 * alone.weights


def test_uneven_pipelines_give_the_first_and_last_stage_one_layer_fewer():
    shape = shape_of(published_config("llama-3.1-405b"), "llama")
    recipe = layout(tensor=8, pipeline=8, context=2, virtual_pipeline=8, count_embedding=True, count_loss=True)
    stages = memory(shape, recipe, 1024)
    assert [sum(stage.layers) for stage in stages] == [15, 16, 16, 16, 16, 16, 16, 15]
    assert sum(stage.parameters for stage in stages) * 8 == pytest.approx(shape.parameters, rel=1e-4)
    assert stages[-1].logits > 0 == stages[0].logits


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("models/Meta-Llama-3-70B", "llama-3-70b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("/data/Llama-3.1-405B-Instruct/", "llama-3.1-405b"),
        ("Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("llama3.2-1B", "llama-3.2-1b"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b-v0.3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("demo/assets/smollm2-135m", "smollm2-135m"),
    ],
)
def test_published_models_are_known_by_their_usual_names(name, model):
    assert published_config(name) == published_configs()[model]


def test_other_names_are_not_taken_for_published_models():
    for name in ("models/our-llama", "Llama-2-70b", "Mistral-7B-v0.1", "Llama-3-8B-v2"):
        assert published_config(name) is None


@pytest.mark.parametrize(
    ("keys", "gib"), [([], 0.75), (["fp8"], 0.5), (["fp8", "edges"], 1.25)], ids=["bf16", "fp8", "bf16-edges"]
)
def test_user_buffers_are_twelve_for_each_precision(keys, gib):
    """Of a 70B model with 4,096 tokens a rank each is 64 MiB, the eight that gather half of that in FP8."""
    shape, recipe = shape_of(MODELS["LLaMA-3-70B"][0], "config.json"), Recipe()
    recipe.context.physical, recipe.parallel.tensor, recipe.parallel.sequence = 4096, 4, True
    if "fp8" in keys:
        recipe.precision.fp8, recipe.precision.fp8_recipe = "hybrid", "tensorwise"
        recipe.precision.bf16_edge_layers = 1 if "edges" in keys else 0
    (plain,) = memory(shape, recipe, 4)
    recipe.parallel.overlap_tensor = True
    (overlapped,) = memory(shape, recipe, 4)
    assert (overlapped.buffers - plain.buffers) / 2**30 == gib
