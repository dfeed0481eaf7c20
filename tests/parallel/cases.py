"""What the ranks of the parity tests do, and how their parts are put together again.

The reassembly is written out by hand here, apart from mapping.py, so that a mistake in that map is
seen and not repeated.
"""

from pathlib import Path

import numpy as np

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import load_resolved
from endprompt_megatron.method.positions import copies, position_ids, segment_lengths
from endprompt_megatron.model.shape import ModelShape, read_shape

PROMPT_LENS = (5, 7)

SHAPES = {
    "gqa": {},
    "six-layers": {"num_hidden_layers": 6},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "odd-vocab": {"vocab_size": 321},
    "odd-vocab-tied": {"vocab_size": 321, "tie_word_embeddings": True},
    "head-dim": {"head_dim": 32},
    "mistral": {"model_type": "mistral"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "attention-bias": {"attention_bias": True},
    "mlp-bias-mha": {"mlp_bias": True, "num_key_value_heads": 4},
}
LAYOUTS = {
    "tp1-pp1": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp2-dp2": (4, ["parallel.tensor=2"]),
    "tp2-pp2-sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "cp4": (4, ["parallel.context=4"]),
    "cp2-tp2-sp": (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "cp2-pp2": (4, ["parallel.context=2", "parallel.pipeline=2"]),
    "cp2-dp2": (4, ["parallel.context=2"]),
    "pp3-uneven": (3, ["parallel.pipeline=3", "parallel.count_embedding=true", "parallel.count_loss=true"]),
    "dp2-overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "pp2-dp2-overlap": (
        4,
        ["parallel.pipeline=2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
}
RECOMPUTE = {
    "kept": [],
    "selective": ["parallel.recompute=selective"],
    "full": ["parallel.recompute=full"],
    "full-by-two": ["parallel.recompute=full", "parallel.recompute_layers=2"],
    "block": ["parallel.recompute=block", "parallel.recompute_layers=1"],
}


def recipe_for(directory: Path, hf: Path, megatron: Path, *overrides: str) -> Recipe:
    """A float32 recipe around a small model: window 64, target 256, 40 physical tokens."""
    path = directory / "recipe.yaml"
    if not path.exists():
        path.write_text(
            f"model: {{hf: {hf}, init_from: {megatron}}}\n"
            "context: {original: 64, target: 256, physical: 40, prompt_loss_weight: 0.5}\n"
            "data: {train: none}\n"
            "train: {steps: 10, global_batch_size: 8}\n"
            "optim: {lr: 1.0e-2, warmup_steps: 2, weight_decay: 0.1}\n"
            "precision: {dtype: float32}\n"
            f"checkpoint: {{dir: {directory / 'run'}}}\n"
        )
    return load_resolved(path, overrides)


def make_samples(recipe: Recipe, vocab: int, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`count` samples of random tokens with the recipe's position map, [count, s] each; prompts of two lengths."""
    generator = np.random.default_rng(seed)
    c = recipe.context
    samples = []
    for index in range(count):
        length = (PROMPT_LENS[index % 2] + c.recall.tokens) * copies(c.method, **c.knobs)
        a, b = segment_lengths(c.method, c.physical, length, c.target)
        samples.append(one_sample(recipe, generator.integers(0, vocab, a + b), b, index))
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def one_sample(recipe: Recipe, tokens: np.ndarray, b: int, index: int) -> dict[str, np.ndarray]:
    """A sample of these tokens, of which the last b are the prompt; [a + b] each.

    Of a recall prompt, each copy's last tokens are taken from the context, and the first of them have weight 0.
    """
    c, a = recipe.context, len(tokens) - b
    recalled, key = c.recall.tokens, np.zeros(a + b, bool)
    for end in range(a + b, a, -b // copies(c.method, **c.knobs)) if recalled else []:
        begin, place = end - recalled, (5 * index + end) % (a - recalled)
        tokens[begin:end] = tokens[place : place + recalled]
        key[begin - 1 : begin - 1 + c.recall.key] = True  # of targets
    is_prompt = np.arange(1, a + b + 1) >= a if b else np.zeros(a + b, bool)
    weights = np.where(is_prompt, np.where(key, 0.0, c.prompt_loss_weight), 1.0).astype(np.float32)
    weights[-1] = 0
    return {
        "tokens": tokens,
        "labels": np.append(tokens[1:], 0),
        "position_ids": position_ids(c.method, a, b, c.target, index=index, seed=3, **c.knobs),
        "loss_weights": weights,
        "prompt_mask": is_prompt,
    }


def make_packed(recipe: Recipe, vocab: int, count: int, seed: int = 0) -> tuple[list, list]:
    """`count` packed rows of samples of random lengths, prompts of two lengths; and all the samples, each alone.

    Samples stand in a row as they come, padded to multiples of data.align; the first row has a single one.
    """
    generator = np.random.default_rng(seed)
    c, align = recipe.context, recipe.data.align
    rows, alone = [], []
    for number in range(count):
        placed, bounds = [], [0]
        while True:
            longest = c.physical if number == 0 else c.physical // 2
            a, b = segment_lengths(
                c.method, int(generator.integers(10, longest + 1)), PROMPT_LENS[len(alone) % 2], c.target
            )
            end = bounds[-1] + -(-(a + b) // align) * align
            if end > c.physical or (number == 0 and placed):
                break
            placed.append(one_sample(recipe, generator.integers(0, vocab, a + b), b, len(alone)))
            alone.append(placed[-1])
            bounds.append(end)
        row = {key: np.zeros(c.physical, value.dtype) for key, value in placed[0].items()}
        row["tokens"][:] = generator.integers(0, vocab, c.physical)  # in the padding, where nothing should see them
        for sample, start in zip(placed, bounds[:-1], strict=True):
            for key, value in sample.items():
                row[key][start : start + len(value)] = value
        bounds += [c.physical] if bounds[-1] < c.physical else []
        rows.append({**row, "cu_seqlens": np.array(bounds, dtype=np.int32)})
    return rows, alone


def build(recipe: Recipe):
    """What train.py builds, on this rank: (shape, models, optimizer, scheduler), weights loaded."""
    from endprompt_megatron.checkpoint.resume import initialise
    from endprompt_megatron.distributed import runtime

    p = recipe.parallel
    runtime.start(p.tensor, p.pipeline, p.virtual_pipeline, p.context, recipe.train.seed)
    from endprompt_megatron.convert.direct import weights_to_start_from
    from endprompt_megatron.convert.peft_start import adapter_to_start_from
    from endprompt_megatron.data.samples.terminal_segments import positions_are_shared
    from endprompt_megatron.model.llama import build_model
    from endprompt_megatron.training.optimizer import build_optimizer, wrap_models

    shape = read_shape(recipe.model.hf)
    shared = positions_are_shared(recipe)
    models = wrap_models(
        build_model(shape, recipe, exported(recipe), shared_positions=shared), recipe.parallel, recipe.precision
    )
    optimizer, scheduler = build_optimizer(models, recipe.optim, recipe.precision, recipe.train.steps)
    weights = weights_to_start_from(Path(recipe.model.init_from), shape, "test: model.init_from")
    adapter = adapter_to_start_from(recipe.longlora, shape, "test")
    initialise(weights, models, optimizer, adapter, adapter.keys if adapter else ())
    return shape, models, optimizer, scheduler


def weights_held(recipe: Recipe) -> dict[str, np.ndarray]:
    """On a rank: every parameter, and the optimizer's master copy of its share."""
    _, models, optimizer, _ = build(recipe)
    held = {
        f"{chunk}.{name}": parameter.detach().float().numpy().copy()
        for chunk, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }
    masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return held | {f"master.{index}": each.detach().numpy().copy() for index, each in enumerate(masters)}


def exported(recipe: Recipe) -> dict:
    from endprompt_megatron.config.resolve import config_to_export

    return config_to_export(recipe, read_shape(recipe.model.hf), "test")


def micro_batches(recipe: Recipe, samples: dict[str, np.ndarray] | list) -> list:
    """This rank's micro-batches of the samples, or of packed rows, in the order of the contract."""
    import torch
    from megatron.core import parallel_state

    from endprompt_megatron.data.samples.batches import join_rows
    from endprompt_megatron.distributed.runtime import device
    from endprompt_megatron.model.context_parallel import zigzag_slice

    cp_rank, cp_size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows = recipe.train.micro_batch_size
    packed = isinstance(samples, list)
    count = len(samples if packed else samples["tokens"]) // (rows * size)
    batches = []
    for m in range(count):
        start = (m * size + rank) * rows
        if packed:
            chosen = [{key: torch.from_numpy(value) for key, value in row.items()} for row in samples[start:][:rows]]
            batch = join_rows(chosen, cp_rank, cp_size)
        else:
            batch = {key: torch.from_numpy(value[start : start + rows]) for key, value in samples.items()}
            batch = {key: zigzag_slice(value, cp_rank, cp_size, dim=1) for key, value in batch.items()}
        batches.append({key: value if key == "cu_seqlens" else value.to(device()) for key, value in batch.items()})
    return batches


def losses_and_gradients(recipe: Recipe, samples: dict[str, np.ndarray] | list, prepare=None) -> dict:
    """On a rank: the losses, and this rank's part of every gradient with what is needed to join it.

    `prepare`, importable by name, gets the model chunks first.
    """
    return losses_and_gradients_of_each(recipe, [(recipe, samples)], prepare)[0]


def losses_and_gradients_of_each(recipe: Recipe, cases: list[tuple[Recipe, dict | list]], prepare=None) -> list[dict]:
    """On a rank: the same of several batches by one model.  Their recipes may differ in what builds no model."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from endprompt_megatron.training.optimizer import zero_grad
    from endprompt_megatron.training.step import run_batch

    _, models, optimizer, _ = build(recipe)
    if prepare is not None:
        prepare(models)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = []
    for own, samples in cases:
        zero_grad(models, optimizer)
        losses = run_batch(models, micro_batches(own, samples), backward=True)
        for buffer in (buffer for model in models for buffer in model.buffers):
            for bucket in buffer.buckets:  # the distributed optimizer leaves each rank with its shard
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
        tp = parallel_state.get_tensor_model_parallel_rank()
        found.append({"losses": losses, "tp": tp, "parts": _gradients(models)})
    return found


def _gradients(models: list) -> dict[str, np.ndarray]:
    parts = {}
    for model in models:
        layers = {layer: layer.layer_number - 1 for layer in model.module.decoder.layers}
        named = [(f"{number}.{name}", p) for layer, number in layers.items() for name, p in layer.named_parameters()]
        named += [each for each in model.module.named_parameters() if not each[0].startswith("decoder.layers.")]
        for name, parameter in named:
            if parameter.requires_grad:
                parts[name] = parameter.main_grad.float().cpu().numpy().copy()
    return parts


def every_target(recipe: Recipe, samples: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """On a rank of the last pipeline stage: loss and correctness of every target, as validation probes read them."""
    from endprompt_megatron.training.step import token_losses

    _, models, _, _ = build(recipe)
    for model in models:
        model.eval()
    result = token_losses(models, micro_batches(recipe, samples))
    return None if result is None else tuple(part.numpy() for part in result)


def join_gradients(results: list[dict], shape: ModelShape) -> dict[str, np.ndarray]:
    """Gradients under Hugging Face's names from all ranks' parts."""
    by_name: dict[str, dict[int, np.ndarray]] = {}
    for result in results:
        for name, part in result["parts"].items():
            by_name.setdefault(name, {})[result["tp"]] = part
    joined = {}
    for name, parts in by_name.items():
        joined.update(_to_hf(name, [parts[tp] for tp in sorted(parts)], shape))
    return joined


def _to_hf(name: str, parts: list[np.ndarray], shape: ModelShape) -> dict[str, np.ndarray]:
    rows = np.concatenate(parts, 0)
    if name == "embedding.word_embeddings.weight":
        return {"model.embed_tokens.weight": rows[: shape.vocab_size]}
    if name == "output_layer.weight":
        return {} if shape.tied_embeddings else {"lm_head.weight": rows[: shape.vocab_size]}
    if name == "decoder.final_layernorm.weight":
        return {"model.norm.weight": parts[0]}
    layer, _, kind = name.partition(".")
    prefix = f"model.layers.{layer}."
    # Transformer Engine keeps the norms with the matrices that follow them.
    if kind in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        return {prefix + "input_layernorm.weight": parts[0]}
    if kind in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"):
        return {prefix + "post_attention_layernorm.weight": parts[0]}
    if kind in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
        return {prefix + f"self_attn.{kind[len('self_attention.')]}_norm.weight": parts[0]}
    if ".adapter." in kind:
        return _adapters_to_hf(prefix, kind, parts, rows)
    if kind == "self_attention.linear_proj.bias":
        return {prefix + "self_attn.o_proj.bias": parts[0]}
    if kind == "mlp.linear_fc2.bias":
        return {prefix + "mlp.down_proj.bias": parts[0]}
    if kind == "self_attention.linear_proj.weight":
        return {prefix + "self_attn.o_proj.weight": np.concatenate(parts, 1)}
    if kind == "mlp.linear_fc2.weight":
        return {prefix + "mlp.down_proj.weight": np.concatenate(parts, 1)}
    tail = kind.rpartition(".")[2]
    if kind.startswith("mlp.linear_fc1."):
        halves = [np.split(part, 2, 0) for part in parts]
        return {
            prefix + f"mlp.gate_proj.{tail}": np.concatenate([gate for gate, _ in halves]),
            prefix + f"mlp.up_proj.{tail}": np.concatenate([up for _, up in halves]),
        }
    assert kind.startswith("self_attention.linear_qkv."), name
    d, per_group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    q, k, v = [], [], []
    for group in np.split(rows, shape.num_kv_heads, 0):
        q.append(group[: per_group * d])
        k.append(group[per_group * d : (per_group + 1) * d])
        v.append(group[(per_group + 1) * d :])
    names = (("q", q), ("k", k), ("v", v))
    return {prefix + f"self_attn.{letter}_proj.{tail}": np.concatenate(value) for letter, value in names}


# Hugging Face's matrices, by Megatron's that has an adapter.
_ADAPTED = {
    "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention.linear_proj": ["self_attn.o_proj"],
    "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.linear_fc2": ["mlp.down_proj"],
}


def _adapters_to_hf(prefix: str, kind: str, parts: list[np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    linear, _, which = kind.partition(".adapter.")
    names = _ADAPTED[linear]
    if which == "up":
        return {f"{prefix}{names[0]}.up": parts[0]}
    if which != "down":
        (name,) = (name for name in names if name.endswith(f".{which.removeprefix('up_')}_proj"))
        return {f"{prefix}{name}.up": rows}
    if len(names) == 1:
        return {f"{prefix}{names[0]}.down": np.concatenate(parts, 1)}
    return {f"{prefix}{name}.down": value for name, value in zip(names, np.split(parts[0], len(names)), strict=True)}
