"""Training equals transformers with torch's AdamW; what is exported is what was trained; bad steps are skipped.

In float64, where both agree to the last digits.  In float32, once a layout, ours is as exact as transformers'.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from float64 import in_float64, widened
from parallel.cases import build, exported, make_samples, micro_batches, recipe_for
from parallel.reference import EXACT, assert_as_exact, huggingface_loss, huggingface_model
from small import small_llama

from endprompt_megatron.convert.to_hf import convert_megatron_to_hf
from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron
from endprompt_megatron.model.shape import read_shape

STEPS = 10
TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An odd vocabulary: padded inside for two tensor ranks, cut on export."""
    directory = tmp_path_factory.mktemp("training")
    small_llama(directory / "hf", vocab_size=321, tie_word_embeddings=True)
    convert_hf_to_megatron(directory / "hf", directory / "megatron")
    return directory, directory / "hf", directory / "megatron"


def train_steps(recipe, batches, root=None):
    """On a rank, of one update a batch: loss, gradient norm, whether it was made, sum of the weights after it.

    Then a checkpoint, if a root is given.
    """
    from endprompt_megatron.checkpoint.run_state import Progress, RunState
    from endprompt_megatron.checkpoint.save import Saver
    from endprompt_megatron.training.optimizer import update, zero_grad
    from endprompt_megatron.training.step import run_batch

    _, models, optimizer, scheduler = build(recipe)
    seen = []
    for samples in batches:
        zero_grad(models, optimizer)
        losses = run_batch(models, micro_batches(recipe, samples), backward=True)
        norm, updated = update(optimizer, losses.total, recipe.optim.grad_clip)
        scheduler.step(increment=1)
        seen.append((losses.total, norm, updated, float(sum(p.double().sum() for p in models[0].parameters()))))
    if root is not None:
        progress = Progress(len(batches), 0)
        state = RunState(models, optimizer, scheduler)
        with Saver(root, recipe, {"config.json": exported(recipe)}, state) as saver:
            saver.save(progress)
            saver.wait()
    return seen


def logits_of(recipe, tokens, positions):
    """On a rank: the model's own logits [b, s, v], joined over tensor ranks, from the last pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    _, models, _, _ = build(recipe)
    batch = {"tokens": torch.from_numpy(tokens), "position_ids": torch.from_numpy(positions)}
    kept = []

    def forward(iterator, model):
        data = next(iterator)
        return model(data["tokens"], data["position_ids"]), keep

    def keep(logits):
        kept.append(gather_from_tensor_model_parallel_region(logits))
        return logits.sum(), torch.ones((), dtype=torch.int), {}

    from megatron.core.pipeline_parallel import get_forward_backward_func

    for wrapped in models:
        wrapped.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([batch]),
            model=models[0],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
        )
    last = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    return kept[0].numpy() if last else None


LAYOUTS = {
    "tp1-pp1": (1, []),
    "tp2-pp2-sp": (4, TP2_PP2),
    "dp2": (2, []),
    "dp2-overlap": (2, ["parallel.overlap_grad_reduce=true"]),
    "cp2-dp2": (4, ["parallel.context=2"]),
}


def ten_steps(model, keys):
    """A recipe and its batches."""
    recipe = recipe_for(*model, *keys, "optim.grad_clip=0.5")
    vocab = read_shape(recipe.model.hf).vocab_size
    return recipe, [make_samples(recipe, vocab, 8, seed=step) for step in range(STEPS)]


def train_huggingface(recipe, batches) -> np.ndarray:
    """Loss and gradient norm of every step, [step, 2] float64."""
    reference = huggingface_model(recipe, train=True)
    o = recipe.optim
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    norms = [p for p in reference.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps)
    seen = []
    for step, samples in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = o.lr * min(step / o.warmup_steps, 1.0)
        adamw.zero_grad()
        total, *_ = huggingface_loss(reference, samples)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), o.grad_clip)
        adamw.step()
        seen.append((total.item(), norm.item()))
    return np.array(seen)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ten_steps_equal_torch_adamw_on_huggingface(ranks, model, layout):
    world, keys = layout
    recipe, batches = ten_steps(model, keys)
    expected = in_float64(train_huggingface, recipe, batches)
    for seen in ranks.run(world, in_float64, train_steps, recipe, batches):
        assert all(updated for _, _, updated, _ in seen)
        np.testing.assert_allclose([each[:2] for each in seen], expected, rtol=EXACT)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(value, id=name, marks=[] if name == "tp2-pp2-sp" else pytest.mark.full)
        for name, value in LAYOUTS.items()
    ],
)
def test_ten_steps_in_float32_are_as_exact_as_torch_adamw_on_huggingface(ranks, model, layout):
    world, keys = layout
    recipe, batches = ten_steps(model, keys)
    expected, rounded = in_float64(train_huggingface, recipe, batches), train_huggingface(recipe, batches)
    for seen in ranks.run(world, train_steps, recipe, batches):
        found = np.array([each[:2] for each in seen])
        for column in (0, 1):  # losses, norms
            assert_as_exact(found[:, column], rounded[:, column], expected[:, column])


def exported_logits(directory, tokens, positions) -> np.ndarray:
    """transformers', of an exported model."""
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), torch.from_numpy(tokens)
    positions, mask = torch.from_numpy(positions), torch.ones_like(ids)
    with torch.no_grad():
        return widened(model)(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits.numpy()


def test_trained_model_is_exported_as_it_is_and_loads_in_another_layout(ranks, model, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = recipe_for(*model, *TP2_PP2, "context.rope.type=yarn")
    shape = read_shape(recipe.model.hf)
    batches = [make_samples(recipe, shape.vocab_size, 8, seed=step) for step in range(3)]
    ranks.run(4, train_steps, recipe, batches, tmp_path / "trained")
    convert_megatron_to_hf(tmp_path / "trained", tmp_path / "exported")

    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["max_position_embeddings"] == recipe.context.target
    assert config["vocab_size"] == shape.vocab_size
    assert config["rope_parameters"]["rope_type"] == config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_parameters"]["factor"] == 4.0

    samples = make_samples(recipe, shape.vocab_size, 2, seed=99)
    tokens, positions = samples["tokens"], samples["position_ids"]
    expected = in_float64(exported_logits, tmp_path / "exported", tokens, positions)
    for world, keys in ((1, []), (2, ["parallel.pipeline=2"]), (2, ["parallel.tensor=2"])):
        loaded = recipe_for(*model, *keys, "context.rope.type=yarn", f"model.init_from={tmp_path / 'trained'}")
        results = ranks.run(world, in_float64, logits_of, loaded, tokens, positions)
        (ours,) = [result for result in results if result is not None]
        np.testing.assert_allclose(ours[..., : shape.vocab_size], expected, rtol=EXACT, atol=EXACT)
    # Exported again after a pass through Megatron, the weights are the same to the last bit.
    convert_hf_to_megatron(tmp_path / "exported", tmp_path / "again")
    convert_megatron_to_hf(tmp_path / "again", tmp_path / "twice")
    once, twice = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("exported", "twice")
    )
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_weights_from_another_layout_are_the_same_to_the_last_bit(ranks, model, tmp_path):
    from safetensors.torch import load_file

    recipe = recipe_for(*model, *TP2_PP2)
    ranks.run(4, train_steps, recipe, [], tmp_path / "untrained")
    convert_megatron_to_hf(tmp_path / "untrained", tmp_path / "exported")
    before, after = (load_file(Path(d) / "model.safetensors") for d in (recipe.model.hf, tmp_path / "exported"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nonfinite_step_is_skipped_and_leaves_the_weights(ranks, model):
    recipe = recipe_for(*model, "parallel.pipeline=2", "optim.warmup_steps=0")
    shape = read_shape(recipe.model.hf)
    batches = [make_samples(recipe, shape.vocab_size, 8, seed=step) for step in range(3)]
    batches[1]["loss_weights"][3, 5] = np.inf
    for seen in ranks.run(2, train_steps, recipe, batches):
        assert [updated for _, _, updated, _ in seen] == [True, False, True]
        first, second, third = (weights for _, _, _, weights in seen)
        assert first == second != third


def gathers(recipe) -> tuple:
    """On a rank: whether buckets wait for the schedule to gather them, and whether it does."""
    _, models, _, _ = build(recipe)
    return models[0].ddp_config.align_param_gather, models[0].config.param_sync_func is not None


@pytest.mark.parametrize("virtual", [False, True])
def test_the_gather_of_weights_waits_for_the_schedule_only_where_that_starts_it(ranks, model, virtual):
    """Megatron's schedule without virtual stages starts none: aligned, every gather would be waited for."""
    keys = ["parallel.pipeline=2", "parallel.overlap_grad_reduce=true", *["parallel.virtual_pipeline=2"] * virtual]
    assert ranks.run(4, gathers, recipe_for(*model, *keys)) == [(virtual, virtual)] * 4
