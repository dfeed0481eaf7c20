"""Recipes: what is refused before a GPU is touched, in which words, and what a good one resolves to."""

from pathlib import Path

import pytest
from small import assert_one_line_error
from unit.starting import RECIPE

from endprompt_megatron.config.resolve import load_resolved
from endprompt_megatron.distributed.hardware import has_transformer_engine

# name: (overrides, what the line says)
KEYS = {
    "section": (["modle.hf=hf"], ["unknown key modle", "model, context, data"]),
    "key": (["context.metod=pose"], ["unknown key context.metod", "method, original, target"]),
    "deep-key": (["context.rope.base=1"], ["unknown key context.rope.base", "type, factor"]),
    "below-a-value": (["train.steps.max=1"], ["train.steps.max"]),
    "steps-word": (["train.steps=many"], ["train.steps", "many", "Integer"]),
    "steps-fraction": (["train.steps=1.5"], ["train.steps", "1.5", "Integer"]),
    "bool-word": (["parallel.sequence=perhaps"], ["parallel.sequence", "perhaps", "bool"]),
    "async-word": (["checkpoint.async=perhaps"], ["checkpoint.async:", "perhaps", "bool"]),
    "list-for-text": (["context.method=[a,b]"], ["context.method", "string"]),
    "text-for-list": (["context.prompts=EP_1"], ["context.prompts", "EP_1"]),
    "list-of-words": (["train.virtual_distances=[far]"], ["train.virtual_distances", "far", "Integer"]),
    "section-as-value": (["context.rope=linear"], ["context.rope", "linear"]),
    "null": (["optim.lr=null"], ["optim.lr"]),
    "not-an-override": (["train.steps"], ["train.steps", "key=value"]),
    "nothing-before-equals": (["=5"], ["=5", "key=value"]),
    "not-yaml": (["context.prompts=[EP_1"], ["context.prompts=[EP_1", "not valid YAML"]),
    "interpolation": (["data.train=${nowhere}"], ["nowhere"]),
    "hf-empty": (["model.hf=null"], ["model.hf is missing"]),
    "checkpoint-empty": (["checkpoint.dir=''"], ["checkpoint.dir is missing"]),
}
VALUES = {
    "method": (["context.method=endprompt"], ["context.method=endprompt", "end_prompt, end_prompt_random"]),
    "rope": (["context.rope.type=pi"], ["context.rope.type=pi", "linear, ntk"]),
    "knob-of-yarn": (
        ["context.rope.beta_fast=16"],
        ["context.rope.beta_fast=16.0 belongs to yarn, not to type=linear"],
    ),
    "knob-of-two": (
        ["context.rope.attention_factor=1.1"],
        ["context.rope.attention_factor=1.1 belongs to yarn or longrope, not to type=linear"],
    ),
    "ramp": (
        ["context.rope.type=yarn", "context.rope.beta_fast=1"],
        ["context.rope.beta_fast=1.0 should be above beta_slow=1"],
    ),
    "longrope-without": (["context.rope.type=longrope"], ["context.rope.long_factor is missing", "numbers"]),
    "longrope-short": (
        ["context.rope.type=longrope", "context.rope.long_factor=[1.0]"],
        ["context.rope.long_factor should be a list of", "half of head_dim"],
    ),
    "theta-kept": (
        ["context.rope.type=keep", "context.target=64", "context.physical=64", "context.rope.theta=5e5"],
        ["context.rope.theta=500000.0 with type=keep"],
    ),
    "theta-negative": (["context.rope.theta=-1"], ["context.rope.theta=-1.0 should be positive"]),
    "longrope-documents": (
        ["data.packing=documents", "context.rope.type=longrope", "context.rope.long_factor=[1,1,1,1,1,1,1,1]"],
        ["data.packing=documents with context.rope.type=longrope", "packing=stream"],
    ),
    "target-not-above": (["context.target=64"], ["context.target=64", "context.original=64", "nothing to extend"]),
    "target-negative": (["context.target=-1"], ["context.target=-1", "positive"]),
    "physical-too-long": (["context.physical=512"], ["context.physical=512", "context.target=256"]),
    "full-but-short": (["context.method=full"], ["context.method=full", "context.physical=64", "256"]),
    "no-prompts": (["context.prompts=[]"], ["context.prompts", "empty", "EP_1"]),
    "prompt-weight-0": (["context.prompt_loss_weight=0"], ["context.prompt_loss_weight=0", "above 0"]),
    "prompt-weight-negative": (
        ["context.prompt_loss_weight=-1", "context.method=short"],
        ["context.prompt_loss_weight=-1"],
    ),
    "factor": (["context.rope.factor=0.5"], ["context.rope.factor=0.5", "at least 1"]),
    "chunks": (["context.chunks=1", "context.method=pose"], ["context.chunks=1", "at least 2"]),
    "steps-0": (["train.steps=0"], ["train.steps=0", "positive"]),
    "no-steps": (["train.steps=null"], ["train.steps is missing", "train.tokens"]),
    "seed": (["train.seed=-1"], ["train.seed=-1", "4294967295"]),
    "seed-large": (["train.seed=4294967296"], ["train.seed=4294967296", "4294967295"]),
    "valid-interval": (["train.valid_interval=-1"], ["train.valid_interval=-1", "at least 0"]),
    "valid-interval-without": (["train.valid_interval=5"], ["train.valid_interval", "data.valid"]),
    "distances-without": (["train.virtual_distances=[128]"], ["train.virtual_distances", "data.valid"]),
    "distance": (["train.virtual_distances=[512]", "data.valid=train"], ["train.virtual_distances=512", "256"]),
    "keep": (["checkpoint.keep=-1"], ["checkpoint.keep=-1", "at least 0"]),
    "warmup": (["optim.warmup_steps=10"], ["optim.warmup_steps=10", "below 10 steps"]),
    "schedule": (["optim.schedule=linear"], ["optim.schedule=linear", "constant, cosine"]),
    "min-lr": (["optim.min_lr=1"], ["optim.min_lr=1.0", "optim.lr=2e-05"]),
    "weight-decay": (["optim.weight_decay=-0.1"], ["optim.weight_decay=-0.1", "at least 0"]),
    "betas-one": (["optim.betas=[0.9]"], ["optim.betas=[0.9]", "two numbers"]),
    "betas-above": (["optim.betas=[0.9,1.0]"], ["optim.betas=[0.9, 1.0]", "[0, 1)"]),
    "lr-nan": (["optim.lr=nan"], ["optim.lr=nan", "finite"]),
    "lr-inf": (["optim.lr=.inf"], ["optim.lr=inf", "finite"]),
    "weight-decay-nan": (["optim.weight_decay=nan"], ["optim.weight_decay=nan", "finite"]),
    "grad-clip-inf": (["optim.grad_clip=inf"], ["optim.grad_clip=inf", "finite"]),
    "factor-nan": (["context.rope.factor=nan"], ["context.rope.factor=nan", "finite"]),
    "dtype": (["precision.dtype=float16"], ["precision.dtype=float16", "bfloat16, float32"]),
    "fp8": (["precision.fp8=maybe"], ["precision.fp8=maybe", "hybrid, e4m3"]),
    "fp8-attention": (["precision.fp8_attention=true"], ["precision.fp8_attention=true", "precision.fp8"]),
    "packing": (["data.packing=tight"], ["data.packing=tight", "stream, documents"]),
    "align-in-a-stream": (["data.align=8"], ["data.align=8", "data.packing=documents"]),
    "align-zero": (["data.packing=documents", "data.align=0"], ["data.align=0", "positive"]),
    "align-odd": (["data.packing=documents", "data.align=5"], ["context.physical=64", "data.align=5"]),
    "packing-full": (
        ["data.packing=documents", "context.method=full", "context.physical=256"],
        ["data.packing=documents", "context.method=full", "method=short with physical=256"],
    ),
    "packing-dynamic": (["data.packing=documents", "context.rope.type=dynamic"], ["rope.type=dynamic", "such as ntk"]),
    "recompute": (["parallel.recompute=some"], ["parallel.recompute=some", "none, selective, block, full"]),
    "hf-nowhere": (["model.hf=nowhere"], ["model.hf=nowhere", "no such directory", "Hugging Face checkpoint"]),
    "hf-a-file": (["model.hf=file"], ["model.hf=file", "no such directory"]),
    "no-train-data": (["data.train=null"], ["data.train is missing", "prepare_data.py"]),
    "checkpoint-dir-a-file": (["checkpoint.dir=file"], ["checkpoint.dir=file", "not a directory"]),
    "checkpoint-dir-below-a-file": (["checkpoint.dir=file/runs/a"], ["checkpoint.dir=file/runs/a", "not a directory"]),
}
# name: (number of processes, overrides, what the line says)
LAYOUT = {
    "tensor-kv-heads": (
        4,
        ["parallel.tensor=4"],
        ["recipe.yaml: parallel.tensor=4 does not divide num_key_value_heads=2 (hf): use 1 or 2"],
    ),
    "pipeline": (3, ["parallel.pipeline=3"], ["parallel.pipeline=3", "num_hidden_layers=4", "use 1, 2 or 4"]),
    "zero": (1, ["parallel.tensor=0"], ["parallel.tensor=0", "positive"]),
    "virtual-alone": (1, ["parallel.virtual_pipeline=2"], ["parallel.virtual_pipeline=2", "parallel.pipeline above 1"]),
    "virtual-layers": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=3"], ["does not divide", "use 1 or 2"]),
    "virtual-micro-batches": (
        2,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=3"],
        ["the 3 micro-batches", "multiple of parallel.pipeline=2"],
    ),
    "sequence-alone": (1, ["parallel.sequence=true"], ["parallel.sequence=true", "parallel.tensor above 1"]),
    "sequence-odd": (
        2,
        ["parallel.sequence=true", "parallel.tensor=2", "context.physical=65"],
        ["context.physical=65", "parallel.tensor=2"],
    ),
    "context-odd": (2, ["parallel.context=2", "context.physical=66"], ["context.physical=66", "4"]),
    "world-size": (3, ["parallel.pipeline=2"], ["the 3 processes", "multiple of 2"]),
    "batch": (1, ["train.micro_batch_size=3"], ["train.global_batch_size=8", "3 x 1"]),
    "batch-replicas": (3, [], ["train.global_batch_size=8", "1 x 3"]),
}


@pytest.mark.parametrize("case", KEYS)
def test_recipe_key_is_refused(ground, extend, case):
    overrides, needles = KEYS[case]
    assert_one_line_error(extend(ground, "recipe.yaml", *overrides), *needles)


@pytest.mark.parametrize("case", VALUES)
def test_recipe_value_is_refused(ground, extend, case):
    overrides, needles = VALUES[case]
    assert_one_line_error(extend(ground, "recipe.yaml", *overrides), *needles)


@pytest.mark.parametrize("case", LAYOUT)
def test_parallel_layout_is_refused(ground, extend, case):
    world_size, overrides, needles = LAYOUT[case]
    assert_one_line_error(extend(ground, "recipe.yaml", *overrides, world_size=world_size), *needles)


@pytest.mark.skipif(has_transformer_engine(), reason="Transformer Engine is installed")
@pytest.mark.parametrize("key", ["precision.fp8=hybrid", "optim.moments_dtype=bfloat16"])
def test_recipe_key_that_needs_transformer_engine_is_refused_without_it(ground, extend, key):
    result = extend(ground, "recipe.yaml", key)
    assert_one_line_error(result, key, "needs Transformer Engine")


# name: (contents of recipe.yaml or None to remove it, what the line says)
FILES = {
    "missing": (None, ["recipe.yaml", "no such recipe"]),
    "broken": ("model: {hf: hf", ["recipe.yaml", "not valid YAML"]),
    "binary": (b"\xff\xfe\x00model", ["recipe.yaml"]),
    "empty": ("", ["recipe.yaml", "model.hf is missing"]),
    "a-list": ("- model", ["recipe.yaml", "mapping of sections"]),
    "a-word": ("model", ["recipe.yaml", "model"]),
    "repeated-key": ("model: {hf: hf}\nmodel: {hf: other}", ["recipe.yaml", "not valid YAML", "duplicate"]),
    "section-a-number": ("checkpoint: 5", ["recipe.yaml", "checkpoint"]),
    "number-as-key": ("5: 6", ["recipe.yaml", "5"]),
    "no-checkpoint-dir": (RECIPE.replace("{dir: run}", "{}"), ["recipe.yaml", "checkpoint.dir is missing"]),
    "unknown-key": (RECIPE.replace("target:", "traget:"), ["recipe.yaml", "unknown key context.traget"]),
    "steps-and-tokens": (
        RECIPE.replace("steps: 10", "steps: 10, tokens: 1024"),
        ["train.steps=10", "train.tokens=1024 (2 steps)"],
    ),
    "inherit-nowhere": ("inherit: other.yaml", ["other.yaml", "no such recipe"]),
    "inherit-a-number": ("inherit: 5", ["recipe.yaml", "inherit=5"]),
    "inherit-itself": ("inherit: recipe.yaml", ["recipe.yaml", "cycle"]),
}


@pytest.mark.parametrize("case", FILES)
def test_recipe_file_is_refused(place, extend, case):
    content, needles = FILES[case]
    path = place / "recipe.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line_error(extend(place, "recipe.yaml"), *needles)


def test_recipe_that_is_a_directory_is_refused(ground, extend):
    assert_one_line_error(extend(ground, "hf"), "hf", "cannot be read")


def test_recipes_that_inherit_each_other_are_refused(place, extend):
    (place / "a.yaml").write_text("inherit: b.yaml")
    (place / "b.yaml").write_text("inherit: a.yaml")
    assert_one_line_error(extend(place, "a.yaml"), "a.yaml", "cycle")


def load(place: Path, monkeypatch, *overrides: str, recipe: str = "recipe.yaml"):
    monkeypatch.chdir(place)
    return load_resolved(recipe, overrides)


def test_window_and_factor_follow_from_the_model_and_the_lengths(ground, monkeypatch):
    recipe = load(ground, monkeypatch)
    assert recipe.context.original == 64
    assert recipe.context.rope.factor == 4.0
    assert recipe.tokens_per_step == 8 * 64


@pytest.mark.parametrize(("tokens", "steps"), [(512, 1), (513, 2), (10_000, 20)])
def test_token_budget_becomes_steps_of_whole_batches(ground, monkeypatch, tokens, steps):
    assert load(ground, monkeypatch, f"train.tokens={tokens}").train.steps == steps


def test_last_override_of_steps_and_tokens_holds(ground, monkeypatch):
    recipe = load(ground, monkeypatch, "train.tokens=5120000", "train.steps=7")
    assert (recipe.train.steps, recipe.train.tokens) == (7, None)


def test_inherited_recipe_holds_where_a_recipe_does_not_differ(place, monkeypatch):
    (place / "deeper").mkdir()
    (place / "deeper/twin.yaml").write_text("inherit: ../recipe.yaml\ncontext: {target: 512}\ntrain: {tokens: 1024}\n")
    (place / "deeper/again.yaml").write_text("inherit: twin.yaml\ncontext: {prompts: [EP_2, EP_3]}\n")
    recipe = load(place, monkeypatch, "optim.lr=1e-3", recipe="deeper/again.yaml")
    assert (recipe.context.target, recipe.context.physical, recipe.context.prompts) == (512, 64, ["EP_2", "EP_3"])
    assert recipe.context.rope.factor == 8.0
    assert (recipe.train.steps, recipe.train.tokens) == (2, 1024)  # the twin's tokens, not the parent's steps
    assert (recipe.optim.lr, recipe.optim.warmup_steps) == (1e-3, 2)


def test_resolved_recipe_loads_again_and_is_the_same(place, monkeypatch):
    overrides = ["train.tokens=10000", "checkpoint.async=true", "context.rope.type=yarn", "optim.betas=[0.8,0.9]"]
    recipe = load(place, monkeypatch, *overrides, "data.train={train: 3, short: 1.5}", "parallel.virtual_pipeline=2")
    (place / "resolved.yaml").write_text(recipe.as_yaml())
    again = load(place, monkeypatch, recipe="resolved.yaml")
    assert again == recipe
    assert again.as_yaml() == recipe.as_yaml()


@pytest.mark.parametrize("written", ["async: true", "asynchronous: true"])
def test_async_is_one_key_in_yaml_override_and_dict(place, monkeypatch, written):
    assert load(place, monkeypatch, "checkpoint.async=true").checkpoint.asynchronous
    text = RECIPE.replace("{dir: run}", f"{{dir: run, {written}}}")
    (place / "recipe.yaml").write_text(text)
    recipe = load(place, monkeypatch)
    assert recipe.checkpoint.asynchronous
    assert recipe.as_dict()["checkpoint"]["async"]
    assert "asynchronous" not in recipe.as_yaml()
    assert not load(place, monkeypatch, "checkpoint.async=false").checkpoint.asynchronous


@pytest.mark.parametrize(
    ("directory", "run"),
    [
        ("runs/a", "runs/a"),
        ("runs/a/checkpoints", "runs/a"),
        ("runs/a/checkpoints/", "runs/a"),
        ("a-checkpoints", None),
    ],
)
def test_run_directory_is_found_from_checkpoint_dir(ground, monkeypatch, directory, run):
    recipe = load(ground, monkeypatch, f"checkpoint.dir={directory}")
    assert recipe.run_dir == Path(run or directory)
