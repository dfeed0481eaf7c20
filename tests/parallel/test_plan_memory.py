"""What the planner says a GPU holds, beside what real models, optimizers and backward passes hold."""

import pytest
from parallel.cases import build, make_samples, micro_batches, recipe_for
from small import small_llama

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.longlora import held_parameters, trained_parameters
from endprompt_megatron.model.published_shapes import published_config
from endprompt_megatron.model.shape import read_shape, shape_of
from endprompt_megatron.plan.memory import chunk_activations, layer_activations, layer_input, memory, optimizer_bytes

LAYOUTS = {
    "tp1-pp1": (1, []),
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "dp2": (2, []),
    "cp2": (2, ["parallel.context=2"]),
    "tp2-pp2-sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "pp2-dp2": (4, ["parallel.pipeline=2"]),
}


SHIFTED = ["longlora.shifted=true"]
LORA = ["longlora.rank=4"]
MLP = [*LORA, "longlora.mlp=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plan")
    small_llama(directory / "hf", vocab_size=321, hidden_size=128, intermediate_size=320)
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    return directory, directory / "hf", directory / "megatron"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tied")
    small_llama(directory / "hf", vocab_size=321, hidden_size=128, tie_word_embeddings=True)
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    return directory, directory / "hf", directory / "megatron"


def held(recipe) -> dict:
    """On a rank, after a step: its stage, its parameters, and the bytes of weights, gradients and optimizer."""
    from megatron.core import parallel_state

    from endprompt_megatron.training.optimizer import update, zero_grad
    from endprompt_megatron.training.step import run_batch

    shape, models, optimizer, _ = build(recipe)
    zero_grad(models, optimizer)
    losses = run_batch(models, micro_batches(recipe, make_samples(recipe, shape.vocab_size, 8)), backward=True)
    update(optimizer, losses.total, recipe.optim.grad_clip)
    parameters = {id(p): p for model in models for p in model.parameters()}.values()
    owned = [buffer.grad_data for model in models for buffer in model.buffers]
    weights = _bytes(parameters)
    state = []
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            state += group["params"]  # the master weights; float32 weights are their own
        state += [
            value for values in part.optimizer.state.values() for value in values.values() if hasattr(value, "shape")
        ]
    taken = {p.untyped_storage().data_ptr() for p in parameters}
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for p in parameters),
        "weights": weights,
        "gradients": _bytes(owned),
        "optimizer": _bytes(tensor for tensor in state if tensor.untyped_storage().data_ptr() not in taken),
    }


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer_are_within_two_percent_of_the_measured(ranks, model, layout, dtype):
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*model, *keys, f"precision.dtype={dtype}")
    stages = memory(read_shape(recipe.model.hf), recipe, world, te=False)
    found = ranks.run(world, held, recipe)
    assert {rank["stage"] for rank in found} == set(range(recipe.parallel.pipeline))
    for rank in found:
        expected = stages[rank["stage"]]
        assert expected.parameters == rank["parameters"]
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(expected, name) == pytest.approx(rank[name], rel=0.02), name


@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2", "pp2", "pp2-dp2"])
@pytest.mark.parametrize("keys", [[], ["longlora.train_embeddings=false"], MLP], ids=["", "embeddings-frozen", "mlp"])
def test_of_lora_what_is_trained_alone_has_gradients_and_an_optimizer(ranks, tied, layout, keys):
    world, split = LAYOUTS[layout]
    recipe = recipe_for(*tied, *split, *LORA, *keys, "precision.dtype=bfloat16")
    shape = read_shape(recipe.model.hf)
    stages = memory(shape, recipe, world, te=False)
    for rank in ranks.run(world, held, recipe):
        expected = stages[rank["stage"]]
        assert expected.parameters == rank["parameters"]
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(expected, name) == pytest.approx(rank[name], rel=0.02), name
    if layout == "tp1-pp1" and "longlora.train_embeddings=false" not in keys:
        assert held_parameters(shape, recipe.longlora) == stages[0].parameters
        assert trained_parameters(shape, recipe.longlora) == stages[0].trained < stages[0].parameters / 3


@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2", "pp2"])
def test_a_tie_is_counted_where_it_is_held(ranks, tied, layout):
    """Once on a stage that has both ends, twice where the first and the last stage each have one."""
    world, keys = LAYOUTS[layout]
    recipe = recipe_for(*tied, *keys)
    stages = memory(read_shape(recipe.model.hf), recipe, world, te=False)
    for rank in ranks.run(world, held, recipe):
        assert stages[rank["stage"]].parameters == rank["parameters"]


def saved_by(recipe, modules_of) -> list[int]:
    """On a rank: bytes that each of the modules keeps for its backward pass, weights apart; each storage once.

    The rotary angles, which all layers share, are left out.
    """
    import torch

    shape, models, _, _ = build(recipe)
    weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    batch = micro_batches(recipe, make_samples(recipe, shape.vocab_size, recipe.train.micro_batch_size))[0]
    found = []
    for module in modules_of(models[0].module):
        storages: dict[int, tuple[int, object]] = {}

        def keep(tensor, storages=storages):
            storage = tensor.untyped_storage()
            angles = tensor.dtype == torch.float32 and not tensor.requires_grad and tensor.shape[-1] == shape.head_dim
            if storage.data_ptr() not in weights and not (angles and recipe.precision.dtype == "bfloat16"):
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        module.register_forward_pre_hook(lambda *_, hooks=hooks: hooks.__enter__())
        module.register_forward_hook(lambda *_, hooks=hooks: hooks.__exit__(None, None, None))
        found.append(storages)
    models[0](batch["tokens"], batch["position_ids"], labels=batch["labels"])
    return [sum(size for size, _ in storages.values()) for storages in found]


def layers_of(model) -> list:
    return list(model.decoder.layers)


def decoder_of(model) -> list:
    return [model.decoder]


@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2", "tp2-no-sp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layers_activations_are_within_two_percent_of_what_autograd_keeps(ranks, model, layout, dtype):
    """Of the layers without Transformer Engine; what its layers keep less follows in test_plan.py."""
    world, keys = (2, ["parallel.tensor=2"]) if layout == "tp2-no-sp" else LAYOUTS[layout]
    recipe = recipe_for(*model, *keys, f"precision.dtype={dtype}", "train.micro_batch_size=4")
    expected = layer_activations(read_shape(recipe.model.hf), recipe, te=False)
    for sizes in ranks.run(world, saved_by, recipe, layers_of):
        for size in sizes[1:]:
            assert expected == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("keys", [SHIFTED, LORA, [*SHIFTED, *MLP]], ids=["shifted", "lora", "shifted-lora-mlp"])
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2", "tp2-no-sp"])
def test_longloras_activations_are_within_three_percent_of_what_autograd_keeps(ranks, model, layout, keys):
    """Beside them autograd keeps each layer's B's as one matrix, which is nothing next to a real sequence."""
    world, split = (2, ["parallel.tensor=2"]) if layout == "tp2-no-sp" else LAYOUTS[layout]
    recipe = recipe_for(*model, *split, *keys, "precision.dtype=bfloat16", "train.micro_batch_size=4")
    expected = layer_activations(read_shape(recipe.model.hf), recipe, te=False)
    for sizes in ranks.run(world, saved_by, recipe, layers_of):
        for size in sizes[1:]:
            assert expected == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize(
    "keys",
    [
        ["parallel.recompute=none"],
        ["parallel.recompute=block", "parallel.recompute_layers=1"],
        ["parallel.recompute=block", "parallel.recompute_layers=3"],
        ["parallel.recompute=full"],
        ["parallel.recompute=full", "parallel.recompute_layers=2"],
    ],
    ids=lambda keys: "-".join(key.split("=")[1] for key in keys),
)
def test_what_recompute_leaves_is_within_two_percent_of_what_autograd_keeps(ranks, model, keys):
    recipe = recipe_for(*model, *keys, "precision.dtype=bfloat16", "train.micro_batch_size=4")
    shape = read_shape(recipe.model.hf)
    expected = chunk_activations(shape.num_layers, shape, recipe, te=False)
    expected += layer_input(shape, recipe)  # of the final norm
    ((size,),) = ranks.run(1, saved_by, recipe, decoder_of)
    assert expected == pytest.approx(size, rel=0.02)


def parameters_of(name: str) -> int:
    """On a rank: parameters of the real model class, built without memory."""
    import torch

    from endprompt_megatron.distributed import runtime
    from endprompt_megatron.model.llama import build_chunks

    runtime.start(1, 1, None, 1, 0)
    recipe = Recipe()
    with torch.device("meta"):
        (model,) = build_chunks(
            shape_of(published_config(name), name),
            {**published_config(name), "architectures": ["LlamaForCausalLM"]},
            recipe.parallel,
            recipe.precision,
            recipe.longlora,
            shared_positions=True,
        )
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
    ],
)
def test_parameters_of_published_models_are_exact(ranks, name, count):
    """By the planner, by the real model class on the meta device, and by what is published."""
    shape = shape_of(published_config(name), name)
    recipe = Recipe()
    recipe.context.physical = 8192
    (stage,) = memory(shape, recipe, 1)
    (built,) = ranks.run(1, parameters_of, name)
    assert shape.parameters == stage.parameters == built == count
    assert stage.optimizer == count * optimizer_bytes(recipe) == count * 12
