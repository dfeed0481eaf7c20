"""Time of a training step, from what a GPU computes and moves and how fast it does each in practice.

One set of efficiencies applies to every model, layout and precision; benchmarks/plan.md compares the result with
published speeds.  Times are seconds of the slowest pipeline stage.  Arithmetic; no torch, no Megatron.
"""

from dataclasses import dataclass, fields

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import Gpu
from endprompt_megatron.distributed.pipeline import chunk_layers
from endprompt_megatron.model.longlora import adapter_elements, output_is_trained, seen_tokens
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.plan.memory import fp8_share, layer_input, layer_parameters, optimizer_bytes, stage_elements

NODE = 8  # GPUs connected by NVLink


@dataclass(frozen=True)
class Efficiency:
    """The share of the data sheet's figures that is reached: a property of kernels and networks, not of a model."""

    # Of the dense peak by an infinitely large GEMM.  cuBLAS reaches 1,380 of 1,979 TFLOP/s in FP8 at 32,768 cubed, and
    # under a training step's power limit about three quarters of the peak in BF16.
    gemm_bf16: float = 0.74
    gemm_fp8: float = 0.71
    # A GEMM whose dimensions' geometric mean is x reaches x / (x + this): cuBLAS in FP8 on an H100 reaches 1,011,
    # 1,217 and 1,290 TFLOP/s at 2048, 4096 and 8192 cubed.  BF16 takes twice as long, so it loses half as much.
    small_gemm_fp8: float = 790.0
    small_gemm_bf16: float = 395.0
    # Flash attention, forward and backward together, of the BF16 peak, counting the backward pass's second look
    # at the scores (7 GEMMs for 2 forward); a sequence of s tokens reaches s / (s + short_attention) of it.  From our
    # steps at 8K and 64K on an H200, cuDNN 9.14 (benchmarks/gpu_step.md); kernels of 2024 reach 0.32 at any length.
    attention: float = 0.555
    short_attention: float = 2900.0
    # Bytes a logit that the loss reads and writes in float32, beside the logits: from the same steps.
    loss: float = 64.0
    # Of memory bandwidth by norms, RoPE, SwiGLU, casts and AdamW; copies reach 2.9 of 3.35 TB/s on an H100.
    memory: float = 0.80
    # Of a link's rate in one direction by NCCL's collectives on large messages.
    nvlink: float = 0.75
    network: float = 0.75
    # Share of tensor-parallel communication that GEMMs hide with overlap_tensor.
    hidden_tensor: float = 0.65
    # Seconds that the host needs to launch a layer's kernels, forward or backward: about 40, at 7 microseconds each.
    launch: float = 0.28e-3
    # Of the step, for everything not counted: slower ranks, clocks, the data loader, logging.
    other: float = 0.03


EFFICIENCY = Efficiency()


@dataclass
class Work:
    """Seconds by kind; of one layer, one stage or one step."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # norms, RoPE, SwiGLU, casts, gradient accumulation: bound by memory
    launch: float = 0.0  # GPU idle because the host launches too slowly
    tensor: float = 0.0  # exposed communication, as the next three
    context: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0
    bubble: float = 0.0
    other: float = 0.0

    def __add__(self, more: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(more, name) for name in KINDS))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, name) * times for name in KINDS))

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in KINDS)

    def as_dict(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 6) for name in KINDS}


KINDS = tuple(entry.name for entry in fields(Work))


class Clock:
    """Times of a step of this recipe on this GPU, by layer, stage and kind."""

    def __init__(
        self, shape: ModelShape, recipe: Recipe, gpu: Gpu, world_size: int, efficiency: Efficiency = EFFICIENCY
    ) -> None:
        if not gpu.bf16:
            raise InputError(f"{gpu.name}: the speed of this GPU is unknown; choose a kind with --gpu")
        self.shape, self.recipe, self.gpu, self.eff = shape, recipe, gpu, efficiency
        p = recipe.parallel
        self.replicas = world_size // (p.tensor * p.pipeline * p.context)
        self.micro_batches = recipe.train.global_batch_size // (recipe.train.micro_batch_size * self.replicas)
        self.tokens = recipe.train.micro_batch_size * recipe.context.physical / p.context  # per rank
        self.size = 4 if recipe.precision.dtype == "float32" else 2
        self.chunks: dict[int, Work] = {}  # by number of layers: most stages have the same

    # What a device does

    def gemm(self, outputs: float, inputs: float, fp8: bool) -> float:
        """Seconds of one [tokens, inputs] x [inputs, outputs] product."""
        extent = (self.tokens * outputs * inputs) ** (1 / 3)
        if fp8 and self.gpu.fp8:
            rate, small = self.gpu.fp8 * self.eff.gemm_fp8, self.eff.small_gemm_fp8
        else:
            rate, small = self.gpu.bf16 * self.eff.gemm_bf16, self.eff.small_gemm_bf16
        if self.size == 4:
            rate /= 16  # float32 without tensor cores: 67 of 989 TFLOP/s on an H100
        return 2 * self.tokens * outputs * inputs / rate * (1 + small / extent)

    def move(self, count: float) -> float:
        """Seconds to read or write `count` bytes of the GPU's own memory."""
        return count / (self.gpu.bandwidth * self.eff.memory)

    def send(self, count: float, group: int) -> float:
        """Seconds for a rank to send `count` bytes among `group` neighbouring ranks: by NVLink if in one node."""
        if group <= NODE:
            return count / (self.gpu.nvlink * self.eff.nvlink)
        return count / (self.gpu.network * self.eff.network)

    # What a layer is

    def matrices(self) -> list[tuple[float, float]]:
        """(outputs, inputs) of a layer's four matrices on a rank: qkv, proj, fc1, fc2."""
        s, tensor = self.shape, self.recipe.parallel.tensor
        queries = s.num_heads * s.head_dim / tensor
        keys = s.num_kv_heads * s.head_dim / tensor
        ffn = s.ffn_size / tensor
        return [
            (queries + 2 * keys, s.hidden_size),
            (s.hidden_size, queries),
            (2 * ffn, s.hidden_size),
            (s.hidden_size, ffn),
        ]

    def layer(self, fp8: bool) -> tuple[Work, Work]:
        """Forward and backward of one layer for one micro-batch on a rank."""
        s, p, n = self.shape, self.recipe.parallel, self.tokens
        gemm = sum(self.gemm(outputs, inputs, fp8) for outputs, inputs in self.matrices())
        queries = s.num_heads * s.head_dim / p.tensor
        # Zigzag slices give context-parallel ranks equal shares.
        scores = 2 * 2 * n * seen_tokens(self.recipe.longlora, self.recipe.context.physical) * queries
        length = self.recipe.context.physical
        rate = self.gpu.bf16 * self.eff.attention * length / (length + self.eff.short_attention)
        if self.recipe.precision.fp8_attention and self.gpu.fp8:
            # The matrix products run twice as fast, the softmax between them does not.
            rate *= 1.4
        if self.size == 4:
            rate /= 16
        attention = scores / rate
        moved = self.move(n * self._bytes())
        # Casts to FP8: norms write FP8 directly; the other inputs and the gradients of all outputs are read in BF16
        # and written in both orders.
        (outputs, inputs) = zip(*self.matrices(), strict=True)
        cast_inputs = self.move(n * 4 * (inputs[1] + inputs[3])) if fp8 else 0.0
        cast_gradients = self.move(n * 4 * sum(outputs)) if fp8 else 0.0
        forward = Work(gemm=gemm, attention=attention, memory=moved + cast_inputs, tensor=self._tensor(forward=True))
        # Each micro-batch adds its weight gradients to the float32 (or BF16) sum.
        gradient = 2 if self.recipe.precision.grad_reduce == "bfloat16" else 4
        rank = self.recipe.longlora.rank
        adapters = self._adapters() if rank else Work()
        elements = (
            adapter_elements(s, self.recipe.longlora, p.tensor)
            if rank
            else layer_parameters(s, p.tensor) - 2 * s.hidden_size
        )
        summed = 2 * gradient * elements
        backward = Work(
            gemm=gemm if rank else 2 * gemm,  # matrices that LoRA leaves frozen have no gradient
            attention=2.5 * attention,
            memory=2 * moved + cast_gradients + self.move(summed),
            tensor=self._tensor(forward=False),
        )
        forward, backward = forward + adapters, backward + adapters * 2
        forward.context = self._context(attention, 1)
        backward.context = self._context(2.5 * attention, 2)
        for work in (forward, backward):
            work.launch = max(0.0, self.eff.launch - work.gemm - work.attention - work.memory)
        return forward, backward

    def _adapters(self) -> Work:
        """Forward pass of a layer's adapters: thin products, and adding them to the outputs of the matrices."""
        s, rank, tensor = self.shape, self.recipe.longlora.rank, self.recipe.parallel.tensor
        queries, keys = s.num_heads * s.head_dim / tensor, s.num_kv_heads * s.head_dim / tensor
        products = [(3 * rank, s.hidden_size), (queries + 2 * keys, 3 * rank), (rank, queries), (s.hidden_size, rank)]
        wide = s.hidden_size + 2 * (queries + 2 * keys) + queries + 2 * s.hidden_size
        if self.recipe.longlora.mlp:
            ffn = s.ffn_size / tensor
            products += [(2 * rank, s.hidden_size), (2 * ffn, 2 * rank), (rank, ffn), (s.hidden_size, rank)]
            wide += s.hidden_size + 2 * (2 * ffn) + ffn + 2 * s.hidden_size
        # The wide side of each is read or written, which is bound by memory.
        gemm = sum(self.gemm(outputs, inputs, False) for outputs, inputs in products)
        return Work(gemm=gemm, memory=self.move(self.tokens * self.size * wide))

    def _bytes(self) -> float:
        """Bytes per token that a layer's forward pass reads and writes outside GEMMs and attention."""
        s, p = self.shape, self.recipe.parallel
        hidden = s.hidden_size / (p.tensor if p.sequence else 1)
        queries = s.num_heads * s.head_dim / p.tensor
        keys = s.num_kv_heads * s.head_dim / p.tensor
        ffn = s.ffn_size / p.tensor
        count = 2 * (2 * hidden + 3 * hidden)  # norm: in, out; residual: two in, one out; twice a layer
        count += 2 * (queries + keys)  # RoPE
        count += 3 * ffn  # SwiGLU
        return self.size * count

    def _tensor(self, forward: bool) -> float:
        """Exposed seconds of tensor-parallel communication."""
        p = self.recipe.parallel
        if p.tensor == 1:
            return 0.0
        activations = self.tokens * self.size * self.shape.hidden_size
        # Two all-reduces each way, each a reduce-scatter and an all-gather; sequence parallelism gathers the inputs
        # of its two column-parallel matrices once more for their weight gradients.
        passes = 4 if forward or not p.sequence else 6
        seconds = self.send(passes * activations * (p.tensor - 1) / p.tensor, p.tensor)
        return seconds * (1 - self.eff.hidden_tensor if p.overlap_tensor else 1)

    def _context(self, attention: float, times: int) -> float:
        """Exposed seconds of sending keys and values (backward, their gradients too) between ranks."""
        p, s = self.recipe.parallel, self.shape
        if p.context == 1:
            return 0.0
        keys = 2 * s.num_kv_heads * s.head_dim / p.tensor * self.size * self.tokens
        group = p.tensor * p.context
        if p.context_comm == "p2p":
            # A step of attention hides each round of the ring.
            travel = self.send(times * keys, group)
            return (p.context - 1) * max(0.0, travel - attention / p.context)
        if p.context_comm == "a2a":
            queries = 2 * s.num_heads * s.head_dim / p.tensor * self.size * self.tokens
            return self.send(times * (keys + queries) * (p.context - 1) / p.context, group)
        return self.send(times * keys * (p.context - 1), group)

    def chunk(self, layers: int) -> Work:
        """Forward and backward of one micro-batch through a (virtual) stage of `layers` layers."""
        p = self.recipe.parallel
        share = fp8_share(self.shape, self.recipe)
        total = Work()
        for fp8, fraction in ((True, share), (False, 1 - share)):
            if fraction == 0:
                continue
            forward, backward = self.layer(fp8)
            again = {"full": layers, "block": min(p.recompute_layers or 0, layers)}.get(p.recompute, 0)
            work = (forward + backward) * layers + forward * again
            if p.recompute == "selective":
                work = work + Work(attention=forward.attention, context=forward.context) * layers
            total = total + work * fraction
        if p.pipeline > 1:
            # Activations out and gradients back.  Between virtual stages the computation hides them.
            seconds = self.send(2 * layer_input(self.shape, self.recipe), NODE + 1)
            total.pipeline = max(0.0, seconds - total.total) if self._virtual > 1 else seconds
        return total

    @property
    def _virtual(self) -> int:
        return self.recipe.parallel.virtual_pipeline or 1

    def head(self) -> Work:
        """Logits and loss of one micro-batch: up to three products in BF16, and reading and writing the logits."""
        p, s = self.recipe.parallel, self.shape
        vocab = s.padded_vocab(p.tensor) / p.tensor
        trained = output_is_trained(s, self.recipe.longlora)
        summed = 2 * (2 if self.recipe.precision.grad_reduce == "bfloat16" else 4) * vocab * s.hidden_size
        # Written, read for the maximum and the sum, read and written as a gradient.
        moved = self.tokens * vocab * (self.size * 4 + self.eff.loss)
        products = 3 if trained else 2
        return Work(gemm=products * self.gemm(vocab, s.hidden_size, False), memory=self.move(moved + trained * summed))

    # What a step is

    def stage(self, stage: int, layers: list[int]) -> Work:
        """One micro-batch through all of a stage's virtual stages, forward and backward."""
        total = Work()
        for count in set(layers):
            if count not in self.chunks:
                self.chunks[count] = self.chunk(count)
            total = total + self.chunks[count] * layers.count(count)
        return total + self.head() if stage == self.recipe.parallel.pipeline - 1 else total

    @property
    def _retained(self) -> float:
        """Work of context.retain, as a share of a step's: a forward and backward pass more, and the base's forward."""
        retain = self.recipe.context.retain
        return 4 / 3 / retain.every if retain.weight else 0.0

    def step(self) -> Work:
        """A complete step of the slowest stage."""
        p = self.recipe.parallel
        stages = [self.stage(number, layers) for number, layers in enumerate(chunk_layers(self.shape.num_layers, p))]
        slowest = max(range(p.pipeline), key=lambda number: stages[number].total)
        step = stages[slowest] * (self.micro_batches * (1 + self._retained))
        # Filling and draining the pipeline; virtual stages shorten it.
        mean = sum(work.total for work in stages) / p.pipeline
        step.bubble = (p.pipeline - 1) * mean / self._virtual
        step.data = self._data(slowest, stages[slowest])
        group = p.context * self.replicas
        # Gradient in; master weight (float32 weights are their own) and moments in and out; weight out.
        state = 2 * optimizer_bytes(self.recipe) + (8 if self.recipe.precision.dtype == "float32" else 0)
        gradient = 2 if self.recipe.precision.grad_reduce == "bfloat16" else 4
        _, trained = stage_elements(self.shape, self.recipe, slowest)
        step.optimizer = self.move(trained * (gradient + state + self.size) / group)
        step.other = self.eff.other * step.total
        return step

    def _data(self, stage: int, work: Work) -> float:
        """Exposed seconds of reducing gradients and gathering parameters over data- and context-parallel ranks."""
        p = self.recipe.parallel
        group = p.context * self.replicas
        if group == 1:
            return 0.0
        trained = stage_elements(self.shape, self.recipe, stage)[1] * (group - 1) / group
        gradient = 2 if self.recipe.precision.grad_reduce == "bfloat16" else 4
        reduce = self.send(trained * gradient, p.tensor * group)
        gather = self.send(trained * self.size, p.tensor * group)
        # Hidden by the last backward pass and the first forward pass, except for the first bucket.
        exposed = 0.0
        for seconds, overlapped, shield in (
            (reduce, p.overlap_grad_reduce, work.total * 2 / 3),
            (gather, p.overlap_param_gather, work.total / 3),
        ):
            hidden = min(0.95 * seconds, shield) if overlapped is not False else 0.0
            exposed += seconds - hidden
        return exposed
