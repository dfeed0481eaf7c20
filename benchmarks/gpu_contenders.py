"""What gpu_step.py times: the project's own step, transformers' and Megatron-LM's, at LLaMA-3-8B's shape.

A contender waits for its turn after its imports, before it takes anything of the GPU.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONFIG = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
)
TARGET, PHYSICAL, PROMPT = 65536, 8192, 11
FP8 = ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"]
FULL = ["context.method=full", f"context.physical={TARGET}", "parallel.recompute=full"]
ENGINES_LOSS = "EndPrompt 8K, BF16, Transformer Engine's loss"  # instead of the project's own
OURS = {
    "EndPrompt 8K, BF16": [],
    ENGINES_LOSS: [],
    "EndPrompt 8K, FP8 matrix products": FP8,
    "EndPrompt 8K, FP8 with attention": [*FP8, "precision.fp8_attention=true"],
    "EndPrompt 8K, BF16, whole layers recomputed": ["parallel.recompute=full"],
    "full length 64K, BF16, whole layers recomputed": FULL,
    "full length 64K, FP8 with attention, recomputed": [*FULL, *FP8, "precision.fp8_attention=true"],
}
# As transformers trains by default, and with float32 master weights and optimizer state, as ours has them; compiled,
# the loss is one kernel with what comes before it.
TRANSFORMERS = {
    "transformers 8K, BF16 throughout": ("bfloat16", False),
    "transformers 8K, float32 weights, autocast": ("float32", False),
    "transformers 8K, float32 weights, autocast, compiled": ("float32", True),
}
MEGATRON_LM = {"Megatron-LM 8K, BF16": [], "Megatron-LM 8K, FP8 (tensorwise)": ["--fp8-format", "hybrid"]}


@dataclass(frozen=True)
class Contender:
    """Something to time.  `update` follows `backward`; `tokens` of a step; `flops` a token; `planned`: bytes."""

    backward: Callable[[], float]
    update: Callable[[float], None]
    tokens: int
    flops: float
    planned: float | None = None
    about: dict | None = None


def sample(recipe, vocab: int, seed: int) -> dict:
    """One sample of random tokens with the recipe's positions, [1, s] tensors on the GPU."""
    import torch

    from endprompt_megatron.method.positions import position_ids, segment_lengths

    c = recipe.context
    a, b = segment_lengths(c.method, c.physical, PROMPT, c.target)
    tokens = torch.randint(0, vocab, (1, a + b), generator=torch.Generator().manual_seed(seed))
    weights, mask = torch.ones(1, a + b), torch.zeros(1, a + b, dtype=torch.bool)
    weights[0, -1] = 0
    mask[0, a - 1 : -1] = b > 0
    positions = torch.from_numpy(position_ids(c.method, a, b, c.target))[None]
    batch = dict(tokens=tokens, labels=tokens.roll(-1, 1), position_ids=positions)
    return {key: value.cuda() for key, value in dict(batch, loss_weights=weights, prompt_mask=mask).items()}


def write_recipe(directory: Path, micro_batches: int) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(
        f"model: {{hf: {directory}}}\ncontext: {{target: {TARGET}, physical: {PHYSICAL}}}\ndata: {{train: none}}\n"
        f"train: {{steps: 100, global_batch_size: {micro_batches}}}\ncheckpoint: {{dir: {directory}/run}}\n"
    )
    return path


def ours(directory: Path, name: str, micro_batches: int, wait: Callable[[], None]) -> Contender:
    import torch

    from endprompt_megatron.config.constraints.check import load_checked
    from endprompt_megatron.config.resolve import config_to_export
    from endprompt_megatron.data.samples.terminal_segments import positions_are_shared
    from endprompt_megatron.distributed import environment, runtime, te
    from endprompt_megatron.distributed.hardware import here

    overrides = OURS[name]
    if overrides[: len(FULL)] == FULL:
        micro_batches = max(1, micro_batches * PHYSICAL // TARGET)
    recipe, shape = load_checked(write_recipe(directory, micro_batches), overrides, world_size=1)
    environment.set_before_cuda(recipe, "benchmark")
    te.set_environment(recipe, "benchmark", here())

    from endprompt_megatron.model import llama
    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.plan.memory import memory
    from endprompt_megatron.training.optimizer import build_optimizer, update, wrap_models, zero_grad
    from endprompt_megatron.training.step import run_batch

    wait()
    runtime.start(1, 1, None, 1, seed=0)
    c = recipe.context
    config = config_to_export(recipe, shape, "benchmark")
    if name == ENGINES_LOSS:
        take_engines_loss(llama)
    chunks = llama.build_model(shape, recipe, config, shared_positions=positions_are_shared(recipe))
    models = wrap_models(chunks, recipe.parallel, recipe.precision)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    optimizer, _ = build_optimizer(models, recipe.optim, recipe.precision, recipe.train.steps)
    optimizer.reload_model_params()
    batch = [sample(recipe, shape.vocab_size, seed) for seed in range(micro_batches)]

    def backward() -> float:
        zero_grad(models, optimizer)
        return run_batch(models, batch, backward=True).total

    (planned,) = memory(shape, recipe, 1, te=here().te is not None)
    return Contender(
        backward,
        lambda loss: update(optimizer, loss, 1.0),
        c.physical * micro_batches,
        flops_per_token(shape, c.physical),
        planned.allocated,
        {"fusions": fusions(models[0]), "attention": attention_backend},
    )


def take_engines_loss(llama) -> None:
    """In this process, Megatron's choice of losses, and of those Transformer Engine's."""
    from megatron.core.models.gpt import GPTModel

    made = llama.transformer_config

    def config(*args, **options):
        fields = made(*args, **options)
        fields.cross_entropy_loss_fusion, fields.cross_entropy_fusion_impl = True, "te"
        return fields

    llama.transformer_config = config
    llama.LlamaModel.compute_language_model_loss = GPTModel.compute_language_model_loss


def fusions(model) -> dict[str, bool]:
    """What is done in one kernel."""
    from megatron.core.utils import get_model_config

    config = get_model_config(model)
    summed = [m.fuse_wgrad_accumulation for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    return {
        "RoPE": config.apply_rope_fusion,
        "loss": config.cross_entropy_loss_fusion,
        "weight gradients": bool(summed) and all(summed),
        "weight gradients of the output layer": config.gradient_accumulation_fusion,
    }


def attention_backend() -> str | None:
    """Which kernels Transformer Engine chose, after a step; None without it."""
    with contextlib.suppress(ImportError, AttributeError, KeyError):
        from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

        chosen = dot_product_attention._attention_backends
        if chosen["use_flash_attention"]:
            return "flash-attn"
        return f"cuDNN ({chosen['fused_attention_backend']})" if chosen["use_fused_attention"] else "unfused"
    return None


def transformers_step(directory: Path, name: str, micro_batches: int, wait: Callable[[], None]) -> Contender:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from endprompt_megatron.config.load import load_recipe
    from endprompt_megatron.model.flops import flops_per_token
    from endprompt_megatron.model.shape import read_shape

    weights, compiled = TRANSFORMERS[name]
    wait()
    values = json.loads((directory / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = LlamaConfig(**{**values, "max_position_embeddings": TARGET, "rope_scaling": scaling})
    with torch.device("cuda"):
        dtype = getattr(torch, weights)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    shape, recipe = read_shape(directory), load_recipe(write_recipe(directory, micro_batches))
    batches = [sample(recipe, shape.vocab_size, seed)["tokens"] for seed in range(micro_batches)]

    def loss_of(tokens):
        # No mask: with one, its attention is not the fast kernel.  The tail then does not see the context (README);
        # the work is the same to within the prompt's 11 rows.
        return model(tokens, labels=tokens, use_cache=False).loss / micro_batches

    forward = torch.compile(loss_of) if compiled else loss_of

    def backward() -> float:
        optimizer.zero_grad()
        total = 0.0
        for tokens in batches:
            with torch.autocast("cuda", torch.bfloat16, enabled=weights == "float32"):
                loss = forward(tokens)
            loss.backward()
            total = total + loss.detach()
        return float(total)

    def update(_: float) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Contender(backward, update, PHYSICAL * micro_batches, flops_per_token(shape, PHYSICAL))
