"""Which parallel layouts are legal for a model's shape: what Megatron-Core would refuse later, deep inside."""

from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Parallel, Recipe
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.distributed.pipeline import chunk_layers
from endprompt_megatron.model.shape import ModelShape


def check_layout(recipe: Recipe, where: str, shape: ModelShape, world_size: int, hardware: Hardware) -> None:
    """Raise InputError for a layout that cannot work; the line names the nearest one that can."""
    name = Path(recipe.model.hf).name
    _check_tensor(recipe, where, shape, name, hardware)
    _check_pipeline(recipe.parallel, where, shape, name)
    _check_context(recipe, where, shape, name)
    _check_recompute(recipe.parallel, where, shape)
    _check_batch(recipe, where, world_size)


def divisors(*numbers: int) -> str:
    """What divides all the numbers, in words: 1, 2 or 4."""
    return _either([d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)])


def _either(numbers: list[int]) -> str:
    words = list(map(str, numbers))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _check_tensor(recipe: Recipe, where: str, shape: ModelShape, name: str, hardware: Hardware) -> None:
    p, length = recipe.parallel, recipe.context.physical
    for what, count in (("num_key_value_heads", shape.num_kv_heads), ("num_attention_heads", shape.num_heads)):
        if count % p.tensor:
            legal = divisors(shape.num_kv_heads, shape.num_heads, shape.ffn_size)
            raise InputError(
                f"{where}: parallel.tensor={p.tensor} does not divide {what}={count} ({name}): use {legal}"
            )
    if shape.ffn_size % p.tensor:
        raise InputError(
            f"{where}: parallel.tensor={p.tensor} does not divide intermediate_size={shape.ffn_size} ({name})"
        )
    if p.sequence and p.tensor == 1:
        raise InputError(f"{where}: parallel.sequence=true needs parallel.tensor above 1")
    if p.sequence and length % (p.tensor * p.context):
        raise InputError(
            f"{where}: parallel.sequence splits context.physical={length} by parallel.tensor={p.tensor}, "
            "which does not divide it"
        )
    if p.overlap_tensor and not p.sequence:
        raise InputError(
            f"{where}: parallel.overlap_tensor=true hides the gathers of sequence parallelism: "
            "set parallel.sequence=true too, or leave it out"
        )
    if p.overlap_tensor and (hardware.te is None or hardware.gpu is None):
        raise InputError(
            f"{where}: parallel.overlap_tensor=true needs GPUs and Transformer Engine's user buffers: use false here"
        )
    if p.overlap_tensor and recipe.precision.fp8 and recipe.precision.fp8_recipe == "blockwise":
        raise InputError(
            f"{where}: parallel.overlap_tensor=true with precision.fp8_recipe=blockwise: Transformer Engine's user "
            "buffers do not hold its scales; use tensorwise, or overlap_tensor=false"
        )
    if p.overlap_tensor and recipe.train.deterministic:
        raise InputError(
            f"{where}: parallel.overlap_tensor=true with train.deterministic=true: sums would arrive in any order; use "
            "overlap_tensor=false"
        )
    rows = recipe.train.micro_batch_size
    if p.overlap_tensor and rows > 1 and recipe.train.virtual_distances:
        raise InputError(
            f"{where}: parallel.overlap_tensor=true with train.micro_batch_size={rows} and train.virtual_distances: "
            "the probe goes row by row, and Transformer Engine's user buffers have the size of a micro-batch; use "
            "train.micro_batch_size=1, no distances, or overlap_tensor=false"
        )


def _check_pipeline(p: Parallel, where: str, shape: ModelShape, name: str) -> None:
    virtual = p.virtual_pipeline or 1
    if virtual > 1 and p.pipeline == 1:
        raise InputError(f"{where}: parallel.virtual_pipeline={virtual} needs parallel.pipeline above 1")
    for key in ("count_embedding", "count_loss"):
        if getattr(p, key) and p.pipeline == 1:
            raise InputError(f"{where}: parallel.{key}=true needs parallel.pipeline above 1")
    counted = [word for word, on in (("embedding", p.count_embedding), ("loss", p.count_loss)) if on]
    total = shape.num_layers + len(counted)
    what = f"num_hidden_layers={shape.num_layers}" + "".join(f" + {word}" for word in counted)
    if counted:
        what += f" = {total}"
    if total % p.pipeline:
        raise InputError(
            f"{where}: parallel.pipeline={p.pipeline} does not divide {what} ({name}): "
            + _pipeline_remedy(shape.num_layers, p.pipeline, total)
        )
    layers = total // p.pipeline
    if layers % virtual:
        raise InputError(
            f"{where}: parallel.virtual_pipeline={virtual} does not divide the {layers} layers of a "
            f"pipeline stage: use {divisors(layers)}"
        )
    for row in chunk_layers(shape.num_layers, p):
        if min(row) < 1:
            raise InputError(
                f"{where}: parallel.virtual_pipeline={virtual} leaves a stage with the "
                f"{' or the '.join(counted)} and no layer: use fewer virtual stages"
            )


def _pipeline_remedy(layers: int, pipeline: int, total: int) -> str:
    if total > layers and layers % pipeline == 0:
        return "leave out count_embedding and count_loss"
    remedy = f"use {_either([count for count in range(1, 2 * pipeline) if total % count == 0])}"
    for extra, keys in ((1, "parallel.count_loss=true"), (2, "parallel.count_embedding=true and count_loss=true")):
        if (layers + extra) % pipeline == 0:
            return f"{remedy}, or set {keys} ({layers + extra} layers)"
    return remedy


def _check_context(recipe: Recipe, where: str, shape: ModelShape, name: str) -> None:
    p, length = recipe.parallel, recipe.context.physical
    if p.context == 1:
        return
    if length % (2 * p.context):
        raise InputError(
            f"{where}: context.physical={length} should be a multiple of 2 x parallel.context={2 * p.context}"
        )
    heads = shape.num_kv_heads // p.tensor
    if p.context_comm == "a2a" and heads % p.context:
        raise InputError(
            f"{where}: parallel.context_comm=a2a spreads the {heads} key-value heads of a tensor-parallel rank "
            f"({name}) over parallel.context={p.context}, which does not divide them: use p2p"
        )


def _check_recompute(p: Parallel, where: str, shape: ModelShape) -> None:
    if p.recompute == "block" and p.recompute_layers is None:
        raise InputError(
            f"{where}: parallel.recompute_layers is missing: with recompute=block, how many layers of each stage"
        )
    if p.recompute_layers is not None and p.recompute not in ("block", "full"):
        raise InputError(
            f"{where}: parallel.recompute_layers={p.recompute_layers} applies only to recompute=block and "
            f"full, not to {p.recompute}: leave it out"
        )
    max_layers = max(map(max, chunk_layers(shape.num_layers, p)))
    if p.recompute_layers is not None and p.recompute_layers > max_layers:
        raise InputError(
            f"{where}: parallel.recompute_layers={p.recompute_layers} is more than the {max_layers} layers of a stage"
        )
    uneven = [
        count for stage in chunk_layers(shape.num_layers, p) for count in stage if count % (p.recompute_layers or 1)
    ]
    if p.recompute == "full" and uneven:
        raise InputError(
            f"{where}: parallel.recompute_layers={p.recompute_layers} with recompute=full does not divide the "
            f"{uneven[0]} layers of a stage: use a number that does, or leave it out for 1"
        )
    if p.overlap_param_gather and p.overlap_grad_reduce is False:
        raise InputError(
            f"{where}: parallel.overlap_param_gather=true needs overlap_grad_reduce, which is false: set both or none"
        )


def _check_batch(recipe: Recipe, where: str, world_size: int) -> None:
    p = recipe.parallel
    ranks = p.tensor * p.pipeline * p.context
    if world_size % ranks:
        raise InputError(
            f"{where}: parallel.tensor x pipeline x context = {ranks} does not divide the {world_size} processes "
            f"started: start a multiple of {ranks}"
        )
    replicas = world_size // ranks
    micro, batch = recipe.train.micro_batch_size, recipe.train.global_batch_size
    if batch % (micro * replicas):
        raise InputError(
            f"{where}: train.global_batch_size={batch} is not a multiple of micro_batch_size x data parallel = "
            f"{micro} x {replicas}"
        )
    micro_batches = batch // (micro * replicas)
    if p.virtual_pipeline and p.virtual_pipeline > 1 and micro_batches % p.pipeline:
        raise InputError(
            f"{where}: with parallel.virtual_pipeline the {micro_batches} micro-batches of a step should be "
            f"a multiple of parallel.pipeline={p.pipeline}"
        )
