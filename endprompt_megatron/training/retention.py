"""Keeps what the base could do (context.retain): in some steps, its next-token distribution on untouched samples.

Beside each micro-batch of such a step stands the same text at its own positions 0, 1, 2, .., inside the window that the
base was trained with.  The frozen base reads it with its own RoPE, the model with the scaled one, and the loss gets

    weight * sum_i KL(base_i || model_i) / n

over the n context tokens of the global batch that have a target; tokens of a terminal prompt do not count.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from endprompt_megatron.config.recipe import LongLora, Recipe
from endprompt_megatron.model.context_parallel import zigzag_slice
from endprompt_megatron.model.distillation import vocab_divergence
from endprompt_megatron.model.llama import LlamaModel, build_chunks
from endprompt_megatron.model.shape import ModelShape

RETAINED = "retained"  # of a micro-batch: which targets count, [b, s] float32

MicroBatch = dict[str, Tensor]


class Retention:
    """The frozen base on this rank, and its part of a step's loss.  Needs parallel_state, without a pipeline."""

    def __init__(self, recipe: Recipe, shape: ModelShape, config: dict) -> None:
        """The base as built, in the recipe's layout and in `precision.dtype`; its weights are still to be loaded.

        config: the base's own Hugging Face config, with the RoPE that it was trained with.
        """
        self.weight, self.every = recipe.context.retain.weight, recipe.context.retain.every
        precision = replace(recipe.precision, fp8=None)
        layout = replace(recipe.parallel, recompute="none", recompute_layers=None, overlap_tensor=False)
        self.models = build_chunks(shape, config, layout, precision, LongLora(), shared_positions=True)
        self._base: LlamaModel = self.models[0].eval().requires_grad_(False)
        self._targets = torch.zeros(())

    def added_to(self, micro_batches: list[MicroBatch], step: int) -> list[MicroBatch]:
        """A step's micro-batches, and in every `every`-th step those that are compared with the base's.

        `step`: how many were done before.
        """
        if step % self.every:
            return micro_batches
        rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        added = []
        for batch in micro_batches:
            length = batch["tokens"].shape[1] * size
            positions = torch.arange(length, device=batch["tokens"].device)[None]
            counts = ~batch["prompt_mask"] & (batch["loss_weights"] > 0)
            own = {"position_ids": zigzag_slice(positions, rank, size, dim=1), RETAINED: counts.float()}
            added.append({**batch, **own, "loss_weights": torch.zeros_like(batch["loss_weights"])})
        self._targets = torch.stack([batch[RETAINED].sum(dtype=torch.float64) for batch in added]).sum()
        dist.all_reduce(self._targets, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return [*micro_batches, *added]

    def loss(self, batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the step's loss, float32 scalar, and float64 [2]: sum of divergences in nats, and targets.

        logits [b, s, v / tensor parallel]: the model's for a micro-batch of `added_to`.
        """
        with torch.no_grad():
            base = self._base(batch["tokens"], batch["position_ids"])
        apart = vocab_divergence(logits, base, self._base.true_vocab_on_this_rank, self._base.pg_collection.tp)
        total = (apart * batch[RETAINED]).sum()
        report = torch.stack([total.detach().double(), batch[RETAINED].sum(dtype=torch.float64)])
        return self.weight * total / self._targets.float(), report
