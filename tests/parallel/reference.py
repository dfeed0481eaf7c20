"""What transformers gives for the same samples, and how far ours may be from it.

In float64 both sides agree to the last digits (the worst gradient seen, of a model with adapters, is 2e-12 off), so
EXACT shows faults far below what float32 rounds.  In float32 no constant is right for every CPU: ours may be off the
float64 result by AS_GOOD times what transformers' own float32 is off it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from float64 import in_float64, widened
from parallel.cases import exported, join_gradients, losses_and_gradients

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.model.shape import read_shape

EXACT = 1e-10
AS_GOOD = 4


@dataclass(frozen=True)
class Reference:
    """The loss of a global batch with its two parts (None: no such targets), every target's, and every gradient."""

    total: float
    context: float | None
    prompt: float | None
    losses: np.ndarray  # of the targets that count
    gradients: dict[str, np.ndarray]


def huggingface_model(recipe: Recipe, train: bool = False):
    """transformers' model with the config that would be exported, float32, eager attention with a full mask."""
    import torch
    from transformers import AutoModelForCausalLM

    from endprompt_megatron.method.rope import transformers_config

    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.hf, config=transformers_config(exported(recipe)), dtype=torch.float32
    )
    return widened(model).train(train)


def rows_of(samples: dict[str, np.ndarray] | list) -> list[dict[str, np.ndarray]]:
    """Samples one by one, of stacked ones or of a list of any lengths."""
    if isinstance(samples, list):
        return samples
    return [{key: value[row] for key, value in samples.items()} for row in range(len(samples["tokens"]))]


def huggingface_loss(model, samples: dict[str, np.ndarray] | list, mask=None):
    """The same loss by transformers, one sample at a time: (total with graph, context mean, prompt mean, losses).

    mask [1, heads, s, s] bool: who sees whom, if not all.  The last is every target that counts, float64.
    """
    import torch

    total, weight = torch.zeros(()), 0.0
    found: dict[bool, list] = {False: [], True: []}
    for arrays in rows_of(samples):
        # With dynamic frequencies a model keeps those of the longest input that it has seen.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
        sample = {key: torch.from_numpy(value)[None] for key, value in arrays.items()}
        logits = model(
            sample["tokens"],
            position_ids=sample["position_ids"],
            attention_mask=torch.ones_like(sample["tokens"]) if mask is None else mask,
            use_cache=False,
        ).logits
        losses = torch.nn.functional.cross_entropy(logits[0], sample["labels"][0], reduction="none")
        total = total + (losses * sample["loss_weights"][0]).sum()
        weight += float(sample["loss_weights"].sum())
        for is_prompt, kept in found.items():
            chosen = (sample["prompt_mask"][0] == is_prompt) & (sample["loss_weights"][0] > 0)
            kept.append(losses[chosen].detach().double().numpy())
    context, prompt = (np.concatenate(found[is_prompt]) for is_prompt in (False, True))
    means = [float(part.mean()) if len(part) else None for part in (context, prompt)]
    return total / weight, *means, np.concatenate((context, prompt))


def reference(recipe: Recipe, samples, make: Callable = huggingface_model, mask=None) -> Reference:
    """By a model that `make` makes of the recipe, in float32 or, under Float64, in float64."""
    model = make(recipe)
    total, context, prompt, losses = huggingface_loss(model, samples, mask)
    total.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    return Reference(total.item(), context, prompt, losses, gradients)


def errors(found: Reference, expected: Reference) -> dict[str, float]:
    """How far off every loss and gradient is, relatively: of a gradient, norm of the difference over the norm."""
    assert set(found.gradients) == set(expected.gradients)
    result = {}
    for name in ("total", "context", "prompt"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            result[f"loss ({name})"] = abs(ours - theirs) / theirs
    for name, gradient in expected.gradients.items():
        difference = found.gradients[name].astype(np.float64) - gradient
        result[name] = float(np.linalg.norm(difference) / np.linalg.norm(gradient))
    return result


def of_ranks(results: list[dict], recipe: Recipe) -> list[Reference]:
    """What the ranks found: every rank's losses, and the gradients that they have together."""
    gradients = join_gradients(results, read_shape(recipe.model.hf))
    losses = [result["losses"] for result in results]
    return [Reference(each.total, each.context, each.prompt, np.empty(0), gradients) for each in losses]


def assert_within(found: list[Reference], expected: Reference, bounds: Callable[[str], float]) -> None:
    """Every loss and gradient of every rank is at most so far off as `bounds` says for its name."""
    for rank in found:
        off = errors(rank, expected)
        worst = max(off, key=lambda name: off[name] / bounds(name))
        print(f"worst: {off[worst]:.2e} of {bounds(worst):.2e} allowed, {worst}")
        bad = {name: f"{error:.1e}, allowed {bounds(name):.1e}" for name, error in off.items() if error > bounds(name)}
        assert not bad, f"relative errors: {bad}"


def compare(ranks, world: int, recipe: Recipe, given, alone, *, prepare=None, **how) -> None:
    """In float64: losses and gradients of what the ranks are `given` are transformers' of the samples `alone`.

    `prepare` is for the ranks; `how` is for `reference`.
    """
    results = ranks.run(world, in_float64, losses_and_gradients, recipe, given, prepare)
    assert_equal(results, recipe, in_float64(partial(reference, recipe, alone, **how)))


def assert_equal(results: list[dict], recipe: Recipe, expected: Reference) -> None:
    """What the ranks found in float64 is what transformers gives in float64."""
    assert_within(of_ranks(results, recipe), expected, lambda name: EXACT)


def compare_float32(ranks, world: int, recipe: Recipe, given, alone, *, prepare=None, **how) -> None:
    """In float32: ours are as near the float64 result as transformers' are, up to AS_GOOD."""
    results = ranks.run(world, losses_and_gradients, recipe, given, prepare)
    expected = in_float64(partial(reference, recipe, alone, **how))
    theirs = reference(recipe, alone, **how)
    allowed = {name: AS_GOOD * error for name, error in errors(theirs, expected).items()}
    # The error of a mean may be nothing by chance: it is of the size of a target's error.
    target = np.sqrt(np.mean((theirs.losses - expected.losses) ** 2))
    for name in ("total", "context", "prompt"):
        if getattr(expected, name) is not None:
            allowed[f"loss ({name})"] += AS_GOOD * target / getattr(expected, name)
    assert_within(of_ranks(results, recipe), expected, allowed.__getitem__)


def compare_roughly(rank, recipe: Recipe, given, *, loss: float, gradient: float, prepare=None, **how) -> None:
    """On one rank, in whatever precision the recipe has, on a GPU: not further off than `loss` and `gradient`."""
    results = rank.run(1, losses_and_gradients, recipe, given, prepare)
    expected = in_float64(partial(reference, recipe, given, **how))
    assert_within(of_ranks(results, recipe), expected, lambda name: loss if name.startswith("loss") else gradient)


def assert_as_exact(found: np.ndarray, rounded: np.ndarray, expected: np.ndarray) -> None:
    """`found` is as near `expected`, a float64 result, as `rounded` is, which was calculated in float32."""
    assert found.shape == rounded.shape == expected.shape
    assert expected.dtype == np.float64
    error, allowed = (float(np.sqrt(np.mean((each - expected) ** 2))) for each in (found, rounded))
    assert allowed > 0
    assert error <= AS_GOOD * allowed, f"{error:.1e} off, allowed {AS_GOOD} times {allowed:.1e}"
