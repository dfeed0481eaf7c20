"""Memory of a GPU of each pipeline stage, in bytes, by purpose.  Arithmetic; no torch, no Megatron.

It counts what the framework allocates (torch.cuda.max_memory_allocated): weights, gradients, optimizer,
activations, logits, working space, communication buffers.  What the driver and NCCL take in addition is an
assumption and stated separately.
"""

from dataclasses import dataclass

from endprompt_megatron.config.recipe import Parallel, Recipe
from endprompt_megatron.distributed.pipeline import chunk_layers
from endprompt_megatron.model.longlora import adapter_elements
from endprompt_megatron.model.shape import ModelShape

GIB = 2**30
# Assumptions about what torch does not count, in GiB.
CONTEXT_GIB = 1.0  # CUDA context, kernel code, cuBLAS and cuDNN handles
NCCL_GIB = 0.4  # channels, for each kind of communicator that this rank belongs to
FRAGMENTATION = 0.03  # of what is allocated, with expandable segments


@dataclass(frozen=True)
class StageMemory:
    """A GPU of one pipeline stage.  All in bytes, except parameters (elements) and `in_flight` (micro-batches)."""

    stage: int
    layers: list[int]  # of each virtual stage
    parameters: int
    trained: int  # of these parameters
    in_flight: float  # micro-batches whose activations are held at the peak; a fraction with virtual stages
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    buffers: float
    user_buffers: float  # of these: Transformer Engine allocates them itself
    communicators: int  # kinds of groups with more than one rank

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated should report."""
        # Logits are freed before the backward pass of the layers needs its working space.
        peak = max(self.logits, self.working)
        return self.weights + self.gradients + self.optimizer + self.activations + peak + self.buffers

    @property
    def overhead(self) -> float:
        """What torch does not count, from the assumptions above."""
        return (CONTEXT_GIB + NCCL_GIB * self.communicators) * GIB + FRAGMENTATION * (
            self.allocated - self.user_buffers
        )

    @property
    def total(self) -> float:
        return self.allocated + self.overhead

    def as_dict(self) -> dict:
        names = ("weights", "gradients", "optimizer", "activations", "logits", "working", "buffers")
        gib = {name: round(getattr(self, name) / GIB, 3) for name in (*names, "allocated", "overhead", "total")}
        return {
            "stage": self.stage,
            "layers": self.layers,
            "parameters": self.parameters,
            "trained": self.trained,
            "in_flight": round(self.in_flight, 2),
            "gib": gib,
        }


def layer_parameters(shape: ModelShape, tensor: int) -> int:
    """Elements of one transformer layer on a tensor-parallel rank; norms and some biases are on every rank."""
    matrices = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    matrices += 3 * shape.hidden_size * shape.ffn_size
    return (matrices + shape.split_biases) // tensor + shape.whole_vectors


def stage_parameters(shape: ModelShape, p: Parallel, stage: int) -> int:
    """Elements that a rank of this pipeline stage holds, padding of the vocabulary included."""
    layers = sum(chunk_layers(shape.num_layers, p)[stage])
    table = shape.padded_vocab(p.tensor) // p.tensor * shape.hidden_size
    first, last = stage == 0, stage == p.pipeline - 1
    count = layers * layer_parameters(shape, p.tensor)
    if first:
        count += table
    if last:
        count += shape.hidden_size
        if not (shape.tied_embeddings and first):  # tied embeddings on two stages are kept twice
            count += table
    return count


def stage_elements(shape: ModelShape, recipe: Recipe, stage: int) -> tuple[int, int]:
    """Elements that a rank of this pipeline stage holds, adapters included, and how many of them are trained."""
    p, longlora = recipe.parallel, recipe.longlora
    held = stage_parameters(shape, p, stage)
    if not longlora.rank:
        return held, held
    layers = sum(chunk_layers(shape.num_layers, p)[stage])
    first, last = stage == 0, stage == p.pipeline - 1
    trained = adapters = layers * adapter_elements(shape, longlora, p.tensor)
    if longlora.train_norms:
        trained += layers * shape.layer_norms + last * shape.hidden_size
    if longlora.train_embeddings and (first or (last and shape.tied_embeddings)):
        trained += shape.padded_vocab(p.tensor) // p.tensor * shape.hidden_size
    return held + adapters, trained


def optimizer_bytes(recipe: Recipe) -> float:
    """Bytes of AdamW per parameter in a rank's share: two moments, and a float32 master weight for BF16 weights.

    The optimizer that keeps moments in fewer bits keeps of the master weight the 16 bits that the weight lacks
    (Megatron-Core's store_param_remainders).
    """
    moment = {"float32": 4, "bfloat16": 2, "fp8": 1}[recipe.optim.moments_dtype]
    return master_bytes(recipe) + 2 * moment


def master_bytes(recipe: Recipe) -> int:
    """Bytes that are kept of a parameter's master weight."""
    if recipe.precision.dtype != "bfloat16":
        return 0
    return 4 if recipe.optim.moments_dtype == "float32" else 2


def layer_activations(shape: ModelShape, recipe: Recipe, te: bool = True) -> float:
    """Bytes that one layer keeps for its backward pass, for one micro-batch, on a rank.

    `te`: with Transformer Engine's layers.  Without them attention keeps keys and values expanded to all
    heads, and SwiGLU and RoPE keep their intermediate results.  Neither keeps attention scores.
    """
    p, precision = recipe.parallel, recipe.precision
    size = 4 if precision.dtype == "float32" else 2
    tokens = recipe.train.micro_batch_size * recipe.context.physical / p.context
    split = p.tensor if p.sequence else 1
    hidden = shape.hidden_size / split
    queries = shape.num_heads * shape.head_dim / p.tensor
    keys = shape.num_kv_heads * shape.head_dim / p.tensor
    ffn = shape.ffn_size / p.tensor
    log_sum = 4 * shape.num_heads / p.tensor  # of the softmax, float32
    norms = 2 * 4 / split  # one float32 per token and norm
    # Shifted attention expands keys and values, even with TE, and joins the outputs of its groups.  LoRA keeps A x,
    # but the inputs of fc1 and fc2, whose weights have no gradient, only where they have adapters.
    shifted = recipe.longlora.shifted
    lora = _lora_activations(recipe, hidden, ffn)
    if not te:
        # Inputs and outputs of norms; q, expanded k and v, the output; gate and up, up again, silu, product; cosines
        # and sines for q and for k.
        kept = 4 * hidden + 4 * queries + 5 * ffn + 4 * shape.head_dim + shifted * queries
        kept += lora
        return tokens * (size * kept + log_sum + norms)
    # In FP8 the inputs of the four matrices take one byte; what norms, RoPE, attention and SwiGLU keep does not.
    fp8 = precision.fp8 is not None
    matrix_input = 1 if fp8 else size
    kept = 2 * hidden * (size + matrix_input)  # norms' inputs; the inputs of qkv and fc1
    kept += size * (2 * queries + 2 * keys) + (matrix_input * queries if fp8 else 0)  # attention, its output for proj
    kept += size * 2 * ffn + matrix_input * ffn  # gate and up; the input of fc2
    kept += size * (3 * queries - 2 * keys) if shifted else 0
    kept += size * lora
    return tokens * (kept + log_sum + norms)


def _lora_activations(recipe: Recipe, hidden: float, ffn: float) -> float:
    """Elements a token that a layer keeps more with LoRA than without; negative where it keeps fewer."""
    rank, mlp = recipe.longlora.rank, recipe.longlora.mlp
    if not rank:
        return 0.0
    split = recipe.parallel.tensor if recipe.parallel.sequence else 1
    return (5 * rank + 2 * rank / split) if mlp else (3 * rank + rank / split - hidden - ffn)


def layer_input(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes of a layer's input for one micro-batch on a rank: full recompute keeps nothing else."""
    p = recipe.parallel
    size = 4 if recipe.precision.dtype == "float32" else 2
    tokens = recipe.train.micro_batch_size * recipe.context.physical / p.context
    return tokens * size * shape.hidden_size / (p.tensor if p.sequence else 1)


def chunk_activations(layers: int, shape: ModelShape, recipe: Recipe, te: bool = True) -> float:
    """Bytes that a (virtual) stage of `layers` layers keeps for one micro-batch, with the recipe's recompute."""
    p = recipe.parallel
    layer, entry = layer_activations(shape, recipe, te), layer_input(shape, recipe)
    if p.recompute == "full":
        return -(-layers // (p.recompute_layers or 1)) * entry
    if p.recompute == "block":
        recomputed = min(p.recompute_layers or 0, layers)
        return recomputed * entry + (layers - recomputed) * layer
    return layers * layer


def peak_in_flight(stage: int, p: Parallel, micro_batches: int, sizes: list[float]) -> tuple[float, float]:
    """Bytes held at the peak of a step on a stage, and how many micro-batches that is.

    sizes: bytes per micro-batch of each of the stage's virtual stages.  Follows Megatron's 1F1B schedule, and
    its interleaved schedule if there are several.
    """
    virtual, per_micro_batch = len(sizes), sum(sizes)
    if virtual == 1:
        count = min(micro_batches, p.pipeline - stage)
        return count * per_micro_batch, float(count)
    total = micro_batches * virtual
    warmup = min(total, 2 * (p.pipeline - stage - 1) + (virtual - 1) * p.pipeline)

    def chunk(number: int) -> int:
        return number % (p.pipeline * virtual) // p.pipeline

    live = peak = 0.0
    # After the warm-up the schedule repeats, so its first two rounds contain the peak.
    for number in range(min(total + warmup, warmup + 2 * p.pipeline * virtual)):
        if number < total:
            live += sizes[chunk(number)]
            peak = max(peak, live)
        if number >= warmup:
            live -= sizes[virtual - 1 - chunk(number - warmup)]
    return peak, peak / per_micro_batch


def memory(shape: ModelShape, recipe: Recipe, world_size: int, te: bool = True) -> list[StageMemory]:
    """What a GPU of each pipeline stage needs.  `te`: see `layer_activations`."""
    p = recipe.parallel
    replicas = world_size // (p.tensor * p.pipeline * p.context)
    micro_batches = max(1, recipe.train.global_batch_size // (recipe.train.micro_batch_size * replicas))
    return [
        _stage(stage, layers, shape, recipe, replicas, micro_batches, te)
        for stage, layers in enumerate(chunk_layers(shape.num_layers, p))
    ]


def _stage(
    stage: int, layers: list[int], shape: ModelShape, recipe: Recipe, replicas: int, micro_batches: int, te: bool
) -> StageMemory:
    p, precision = recipe.parallel, recipe.precision
    size = 4 if precision.dtype == "float32" else 2
    parameters, trained = stage_elements(shape, recipe, stage)
    tokens = recipe.train.micro_batch_size * recipe.context.physical / p.context
    matrices = sum(layers) * (layer_parameters(shape, p.tensor) - 2 * shape.hidden_size)
    weights = float(parameters * size)
    if recipe.context.retain.weight:
        weights += parameters * size  # the frozen base
    if precision.fp8 is not None:
        # TE keeps each matrix in FP8 over the micro-batches of a step, and its transpose for GEMMs that need it.
        weights += 2 * matrices * fp8_share(shape, recipe)
    gradient = 2 if precision.grad_reduce == "bfloat16" else 4
    sizes = [chunk_activations(count, shape, recipe, te) for count in layers]
    activations, in_flight = peak_in_flight(stage, p, micro_batches, sizes)
    last = stage == p.pipeline - 1
    logits = 0.0
    if last:
        vocab = shape.padded_vocab(p.tensor) / p.tensor
        # The loss overwrites the logits with its gradient; the input and output of the final norm are kept, and the
        # gradient of the output exists for all tokens before it is scattered.
        logits = tokens * size * (vocab + shape.hidden_size) + 2 * layer_input(shape, recipe)
        if p.sequence:
            logits += tokens * size * shape.hidden_size  # gathered again for the gradient of the weights
        if recipe.context.retain.weight:
            logits += tokens * size * vocab  # the base's
        logits += vocab * shape.hidden_size * size  # that gradient, which is separate where Apex is absent
    user_buffers = _user_buffers(recipe) * tokens * shape.hidden_size if p.overlap_tensor else 0.0
    return StageMemory(
        stage=stage,
        layers=layers,
        parameters=parameters,
        trained=trained,
        in_flight=in_flight,
        weights=weights,
        gradients=float(trained * gradient),
        optimizer=trained * optimizer_bytes(recipe) / (p.context * replicas),
        activations=activations,
        logits=logits,
        working=_working(shape, recipe, te),
        buffers=user_buffers + _buffers(shape, recipe),
        user_buffers=user_buffers,
        communicators=sum(ranks > 1 for ranks in (p.tensor, p.pipeline, p.context, replicas)),
    )


def fp8_share(shape: ModelShape, recipe: Recipe) -> float:
    """Share of the layers that compute in FP8."""
    if recipe.precision.fp8 is None:
        return 0.0
    return max(0.0, 1 - 2 * recipe.precision.bf16_edge_layers / shape.num_layers)


def _working(shape: ModelShape, recipe: Recipe, te: bool) -> float:
    """Bytes of a layer's backward pass beyond what is kept: the gradients in SwiGLU, the gathered sequence.

    For recomputed layers, also all activations of one unit.
    """
    p = recipe.parallel
    size = 4 if recipe.precision.dtype == "float32" else 2
    tokens = recipe.train.micro_batch_size * recipe.context.physical / p.context
    work = tokens * size * (3 * shape.ffn_size / p.tensor + 2 * shape.hidden_size)
    if not te:  # without fused accumulation the gradient of a weight is a separate tensor for a moment
        work += 2 * shape.ffn_size / p.tensor * shape.hidden_size * size
    if p.recompute in ("full", "block"):
        unit = (p.recompute_layers or 1) if p.recompute == "full" else 1
        work += unit * layer_activations(shape, recipe, te)
    return work


def _user_buffers(recipe: Recipe) -> int:
    """Bytes a token and hidden channel of Transformer Engine's user buffers, each with the complete sequence.

    Eight that gather and four that reduce (initialize_ub in its module/base.py); in FP8 the gathering ones take a byte,
    and layers left in BF16 have twelve of their own.
    """
    bf16, fp8 = 12 * 2, 8 + 4 * 2
    if not recipe.precision.fp8:
        return bf16
    return fp8 + (bf16 if recipe.precision.bf16_edge_layers else 0)


def _buffers(shape: ModelShape, recipe: Recipe) -> float:
    """Bytes for communication: keys and values in transit around the ring, activations between stages."""
    p = recipe.parallel
    size = 4 if recipe.precision.dtype == "float32" else 2
    tokens = recipe.train.micro_batch_size * recipe.context.physical / p.context
    total = 0.0
    if p.context > 1:
        keys = 2 * shape.num_kv_heads * shape.head_dim / p.tensor
        others = p.context - 1 if p.context_comm == "all_gather" else 2
        total += 2 * others * tokens * size * keys  # those that are received, and their gradients
    if p.pipeline > 1:
        total += 2 * layer_input(shape, recipe)
    return total
