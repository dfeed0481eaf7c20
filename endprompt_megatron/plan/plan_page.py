"""The plan as one page of text, to read before spending the GPU-hours."""

from pathlib import Path

from endprompt_megatron.common.units import format_bytes, format_duration, format_number
from endprompt_megatron.config.recipe import Parallel, Recipe
from endprompt_megatron.method.positions import MAPS
from endprompt_megatron.model.longlora import trained_parameters
from endprompt_megatron.plan.estimate import Estimate
from endprompt_megatron.plan.memory import CONTEXT_GIB, FRAGMENTATION, GIB, NCCL_GIB
from endprompt_megatron.plan.plan import Plan
from endprompt_megatron.plan.step_time import EFFICIENCY, NODE

WIDTH = 120
_KINDS = {
    "gemm": "matrix products",
    "attention": "attention",
    "memory": "norms, RoPE, SwiGLU, casts, summing gradients",
    "launch": "waiting for kernel launches",
    "tensor": "tensor-parallel communication not hidden",
    "context": "context-parallel communication not hidden",
    "pipeline": "pipeline sends not hidden",
    "bubble": "pipeline bubble",
    "data": "reducing gradients, gathering parameters, not hidden",
    "optimizer": "optimizer",
    "other": f"stragglers, data, logging ({EFFICIENCY.other:.0%})",
}


def page(plan: Plan) -> str:
    """The plan, about a page of at most WIDTH columns."""
    sections = [
        _head(plan),
        _layout(plan.estimate),
        _memory(plan.estimate),
        _time(plan.estimate),
        _savings(plan),
        _assumptions(plan),
    ]
    if plan.warnings:
        sections.append(["Warnings", *_wrapped(plan.warnings)])
    return "\n".join("\n".join([*section, ""]) for section in sections).rstrip("\n")


def _head(plan: Plan) -> list[str]:
    recipe, shape, ours = plan.estimate.recipe, plan.shape, plan.estimate
    c = recipe.context
    name = Path(recipe.model.hf).name
    what = f"{c.original:,} -> {c.target:,} tokens by {_method(recipe)}"
    if c.rope.type == "keep":
        trained = "conversations" if recipe.data.kind == "chat" else _method(recipe)
        what = f"keeps its window of {c.target:,} tokens; {trained}"
    lines = [
        f"{name}: {what}".ljust(WIDTH - 1 - len(plan.where)) + f" {plan.where}",
        f"{format_number(shape.parameters / 1e9)} billion parameters: {shape.num_layers} layers, "
        f"hidden {shape.hidden_size}, {shape.num_heads} heads ({shape.num_kv_heads} for keys), "
        f"intermediate {shape.ffn_size}, vocabulary {shape.vocab_size:,}",
    ]
    if recipe.longlora.rank:
        count = format_number(trained_parameters(shape, recipe.longlora) / 1e6)
        lines.append(f"LoRA of rank {recipe.longlora.rank}: {count} million parameters are trained")
    recommended = Path(plan.where).with_name(f"{Path(plan.where).stem}_recommended.yaml")
    if recommended.is_file():
        lines.append(f"With what our own measurements support (docs/rope.md): {recommended.name}")
    if plan.published:
        lines.append(f"The shape is the published one: {recipe.model.hf} was not found.")
    fullest, available = ours.fullest, ours.gpu.memory_gib
    verdict = "FITS" if ours.fits else "DOES NOT FIT"
    lines += [
        "",
        f"{verdict}: {fullest.total / GIB:.1f} of {available:.1f} GiB on the fullest GPU.  {_gpus(ours)}: "
        f"{format_duration(ours.step_seconds)} per step, {format_duration(3600 * ours.hours)} in total, "
        f"{format_number(ours.gpu_hours)} GPU-hours.",
    ]
    if not ours.fits:
        if plan.remedies:
            lines.append("Smallest changes that make it fit:")
        for keys, given in plan.remedies:
            lines.append(
                f"  {' '.join(keys)}: {given.fullest.total / GIB:.1f} GiB, "
                f"{format_duration(given.step_seconds)} per step, {format_number(given.gpu_hours)} GPU-hours"
            )
        if not plan.remedies:
            lines.append("No small change makes it fit; --search --nodes N looks for other layouts.")
    return lines


def _method(recipe: Recipe) -> str:
    name = MAPS[recipe.context.method].title
    name += ", recall" if recipe.context.recall.tokens else ""
    return f"{name}, shifted attention" if recipe.longlora.shifted else name


def _layout(ours: Estimate) -> list[str]:
    recipe = ours.recipe
    p, precision, t = recipe.parallel, recipe.precision, recipe.train
    kind = "BF16" if precision.dtype == "bfloat16" else "float32"
    if precision.fp8:
        attention = "FP8" if precision.fp8_attention else "BF16"
        kind = f"FP8 {precision.fp8}, {precision.fp8_recipe} scaling, {attention} attention"
    grads = "BF16" if precision.grad_reduce == "bfloat16" else "float32"
    options = [
        word
        for word, on in (
            ("sequence parallel", p.sequence),
            ("tensor overlap", p.overlap_tensor),
            ("embedding and loss counted as layers", p.count_embedding and p.count_loss),
        )
        if on
    ]
    recomputed = {
        "none": "nothing recomputed",
        "selective": "core attention recomputed",
        "full": "all layers recomputed",
    }
    options.append(recomputed.get(p.recompute, f"{p.recompute_layers} layers of each virtual stage recomputed"))
    return [
        "Layout",
        f"  GPUs       {_gpus(ours)}: {layout(p, ours.replicas)}",
        f"  options    {', '.join(options)}",
        f"  precision  {kind}; gradients in {grads}, master weights in float32, moments in "
        f"{recipe.optim.moments_dtype}",
        f"  step       {t.global_batch_size} sequences x {recipe.context.physical:,} tokens = "
        f"{recipe.tokens_per_step:,} tokens, in {ours.micro_batches} micro-batches of {t.micro_batch_size} per replica",
        f"  run        {t.steps:,} steps, {_tokens(ours.tokens)}",
    ]


def layout(p: Parallel, replicas: int) -> str:
    """The layout in words: tensor 4 x pipeline 4 (5 virtual) x context 2 x data 2."""
    virtual = f" ({p.virtual_pipeline} virtual)" if (p.virtual_pipeline or 1) > 1 else ""
    return f"tensor {p.tensor} x pipeline {p.pipeline}{virtual} x context {p.context} x data {replicas}"


def _memory(ours: Estimate) -> list[str]:
    """A table with one row per stage."""
    lines = [
        "Memory per GPU, GiB",
        "  stage  layers  parameters  weights  gradients  optimizer  activations (in flight)  logits  working  "
        "allocated  total",
    ]
    for stage in ours.stages:
        columns = [
            f"{stage.stage:>7}",
            f"{sum(stage.layers):>6}",
            f"{format_number(stage.parameters / 1e9):>9} B",
            f"{stage.weights / GIB:>7.1f}",
            f"{stage.gradients / GIB:>9.1f}",
            f"{stage.optimizer / GIB:>9.1f}",
            f"{stage.activations / GIB:>11.1f} ({stage.in_flight:>4.1f})".ljust(23),
            f"{stage.logits / GIB:>6.1f}",
            f"{(stage.working + stage.buffers) / GIB:>7.1f}",
            f"{stage.allocated / GIB:>9.1f}",
            f"{stage.total / GIB:>5.1f}",
        ]
        lines.append("  ".join(columns))
    lines.append(
        "  in flight: micro-batches held; allocated: as torch.cuda.max_memory_allocated; total: with driver and NCCL"
    )
    return lines


def _time(ours: Estimate) -> list[str]:
    step = ours.work.total
    lines = ["Time of a step"]
    shown = [(name, seconds) for name, seconds in ours.work.as_dict().items() if seconds / step >= 0.0005]
    for name, seconds in sorted(shown, key=lambda entry: -entry[1]):
        lines.append(f"  {_KINDS[name]:<54} {format_duration(seconds):>9}  {seconds / step:>6.1%}")
    flops = ours.flops * ours.recipe.tokens_per_step
    lines.append(f"  {'complete step':<54} {format_duration(step):>9}")
    lines.append(
        f"  {format_number(flops / 1e15)} PFLOP per step: {ours.tokens_per_gpu_second:,.0f} tokens/s and "
        f"{ours.tflops:,.0f} TFLOP/s per GPU, {ours.tflops * 1e12 / ours.gpu.bf16:.0%} of its BF16 peak"
    )
    return lines


def _savings(plan: Plan) -> list[str]:
    ours, full = plan.estimate, plan.full
    c = ours.recipe.context
    if c.rope.type == "keep":
        return ["The window is kept: there is no full-length training to compare with."]
    if c.physical >= c.target:
        return [f"This is full-length training at {c.target:,} tokens."]
    if full is None:
        return [f"Full-length training at {c.target:,} tokens does not fit in any layout that was tried."]
    samples = ours.recipe.train.steps * ours.recipe.train.global_batch_size
    rows = [
        ("GPUs", _gpus(ours), _gpus(full), None),
        ("layout (full length: the cheapest found)", _short(ours), _short(full), None),
        ("GFLOP per token", f"{ours.flops / 1e9:,.1f}", f"{full.flops / 1e9:,.1f}", full.flops / ours.flops),
        (
            "GPU-milliseconds per token",
            f"{1e3 / ours.tokens_per_gpu_second:,.3f}",
            f"{1e3 / full.tokens_per_gpu_second:,.3f}",
            ours.tokens_per_gpu_second / full.tokens_per_gpu_second,
        ),
        (
            "GPU-seconds per sample",
            format_number(c.physical / ours.tokens_per_gpu_second),
            format_number(c.target / full.tokens_per_gpu_second),
            c.target / full.tokens_per_gpu_second / (c.physical / ours.tokens_per_gpu_second),
        ),
        (
            f"GPU-hours for {_tokens(ours.tokens)}",
            format_number(ours.gpu_hours),
            format_number(full.gpu_hours_of(ours.tokens)),
            full.gpu_hours_of(ours.tokens) / ours.gpu_hours,
        ),
        (
            f"GPU-hours for {samples:,} samples",
            format_number(ours.gpu_hours),
            format_number(plan.full_same_samples),
            plan.full_same_samples / ours.gpu_hours,
        ),
    ]
    lines = [
        f"What is saved: sequences of {c.physical:,} tokens instead of {c.target:,}, the same number per step",
        f"  {'':<40} {c.method:>22} {'full length':>26}  ratio",
    ]
    for what, own, other, ratio in rows:
        lines.append(f"  {what:<40} {own:>22} {other:>26}" + (f"  {ratio:.1f}x" if ratio else ""))
    return lines


def _short(estimate: Estimate) -> str:
    p = estimate.recipe.parallel
    virtual = f"v{p.virtual_pipeline}" if (p.virtual_pipeline or 1) > 1 else ""
    again = "" if p.recompute == "none" else f", {p.recompute}"
    return f"TP{p.tensor} PP{p.pipeline}{virtual} CP{p.context} DP{estimate.replicas}{again}"


def _assumptions(plan: Plan) -> list[str]:
    e, ours = EFFICIENCY, plan.estimate
    lines = [
        f"matrix products reach {e.gemm_bf16:.0%} of the peak in BF16 and {e.gemm_fp8:.0%} in FP8, small ones less; "
        f"attention up to {e.attention:.0%} of the BF16 peak, by length; memory {e.memory:.0%}; NVLink and network "
        f"{e.network:.0%} of {ours.gpu.nvlink / 1e9:.0f} and {ours.gpu.network / 1e9:.0f} GB/s per GPU. The same for "
        "all models: benchmarks/plan.md compares them with published speeds.",
        f"driver and libraries take {CONTEXT_GIB:.1f} GiB, NCCL {NCCL_GIB:.1f} GiB per kind of group, fragmentation "
        f"{FRAGMENTATION:.0%}. Transformer Engine and Apex are installed (NVIDIA's container), nodes have {NODE} GPUs.",
        f"a checkpoint with its optimizer is {format_bytes(plan.checkpoint_bytes)}; "
        f"{ours.recipe.checkpoint.keep or 'all'} are kept, every {ours.recipe.checkpoint.interval} steps "
        f"({format_duration(ours.recipe.checkpoint.interval * ours.step_seconds)}). "
        "Saving and validation are not timed.",
        f"at {plan.disk / 1e9:g} GB/s (--disk) a checkpoint is written in {format_duration(plan.checkpoint_seconds)}: "
        f"submit with --signal=B:USR2@{plan.signal_seconds}, so that the last one is complete before the time limit.",
    ]
    if plan.full:
        lines.append(
            "the rate of attention was measured on one GPU, at 8K and 64K; faster kernels help full-length training "
            "more. By FLOPs alone, a token is "
            f"{plan.full.flops / ours.flops:.1f} times cheaper, a sample "
            f"{plan.full.flops * ours.recipe.context.target / (ours.flops * ours.recipe.context.physical):.1f} times."
        )
    return ["Assumed", *_wrapped(lines)]


def search_table(recipe: Recipe, where: str, found: list[Estimate], gpus: int, gpu: str) -> str:
    """The layouts that a search found, fastest first, and the overrides for the first."""
    c = recipe.context
    title = f"{Path(recipe.model.hf).name} at {c.physical:,} tokens on {gpus} {gpu}: layouts that are legal and fit"
    lines = [
        title,
        "  tensor  pipeline  virtual  context  data  recompute     GiB  s / step  tokens/s/GPU  TFLOP/s  GPU-hours",
    ]
    for e in found:
        p = e.recipe.parallel
        again = p.recompute if p.recompute != "block" else f"block {p.recompute_layers}"
        lines.append(
            f"  {p.tensor:>6}  {p.pipeline:>8}  {p.virtual_pipeline or 1:>7}  {p.context:>7}  {e.replicas:>4}  "
            f"{again:<10} {e.fullest.total / GIB:>6.1f}  {e.step_seconds:>8.2f}  {e.tokens_per_gpu_second:>12,.0f}  "
            f"{e.tflops:>7.0f}  {format_number(e.gpu_hours):>9}"
        )
    lines += ["", "To use the first one:", f"  {where} {' '.join(layout_keys(recipe, found[0].recipe))}"]
    return "\n".join(lines)


def layout_keys(recipe: Recipe, other: Recipe) -> list[str]:
    """Overrides that give a recipe the layout of the other."""
    keys = []
    for name, value in vars(other.parallel).items():
        if getattr(recipe.parallel, name) != value:
            word = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            keys.append(f"parallel.{name}={word}")
    return keys or ["(the recipe's own)"]


def _gpus(estimate: Estimate) -> str:
    count, name = estimate.gpus, estimate.gpu.name
    if count % NODE or count == NODE:
        return f"{count} {name}"
    return f"{count} {name} ({count // NODE} nodes)"


def _tokens(count: int) -> str:
    return f"{count / 1e9:.2f} billion tokens" if count >= 1e7 else f"{count:,} tokens"


def _wrapped(lines: list[str]) -> list[str]:
    import textwrap

    return [
        row
        for line in lines
        for row in textwrap.wrap(line, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
    ]
