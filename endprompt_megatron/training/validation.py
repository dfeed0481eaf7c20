"""Validation during training: the loss on held-out samples, and the virtual-distance probe.

The probe of method/virtual_probe.py runs through the Megatron model that is being trained.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.samples.feed import Feed
from endprompt_megatron.distributed.runtime import device
from endprompt_megatron.method.virtual_probe import probe_inputs, summarise
from endprompt_megatron.model.context_parallel import rank_order
from endprompt_megatron.training.step import run_batch, token_losses

PROBE_SAMPLES = 4  # per distance and kind; the same text at every step, so that steps can be compared


class Validation:
    """All ranks run it together and return the same values."""

    def __init__(self, recipe: Recipe, feed: Feed, models: list) -> None:
        self.recipe, self.feed, self.models = recipe, feed, models
        self.probes = self._probes() if recipe.train.virtual_distances else []

    def run(self) -> dict[str, Any]:
        """{"valid_loss", "valid_loss_context", "valid_loss_prompt", "virtual": {distance: {"loss", "accuracy"}}}."""
        for model in self.models:
            model.eval()
        try:
            with torch.no_grad():
                losses = run_batch(self.models, self.feed.validation_batch(), backward=False)
            values = {
                "valid_loss": losses.total,
                "valid_loss_context": losses.context,
                "valid_loss_prompt": losses.prompt,
            }
            if self.probes:
                values["virtual"] = {str(probe["distance"]): self._probe(probe) for probe in self.probes}
            return values
        finally:
            for model in self.models:
                model.train()

    def _probes(self) -> list[dict]:
        held_out, physical = self.feed.held_out_tokens(), self.recipe.context.physical
        if len(held_out) < physical:
            raise InputError(
                f"train.valid_samples={self.recipe.train.valid_samples}: the held-out samples have {len(held_out)} "
                f"context tokens, fewer than a row of train.virtual_distances ({physical}, context.physical): use more"
                " samples"
            )
        return probe_inputs(
            held_out,
            physical_len=physical,
            distances=list(self.recipe.train.virtual_distances),
            samples=self._probe_samples(),
            seed=self.recipe.train.seed,
        )

    def _probe_samples(self) -> int:
        """PROBE_SAMPLES or more: with a virtual pipeline, the schedule needs a multiple of its stages."""
        stages = self.recipe.parallel.pipeline if self.recipe.parallel.virtual_pipeline else 1
        return -(-PROBE_SAMPLES // stages) * stages

    def _probe(self, probe: dict) -> dict[str, float]:
        """Loss and accuracy at one distance: every data-parallel rank runs all of it, the last stage has the result."""
        rows = [self.feed.on_this_rank(batch) for batch in _as_micro_batches(probe)]
        result = token_losses(self.models, rows)
        found: list[Any] = [None]
        if result is not None:
            losses, correct = (_gather_rows(share)[:, :-1].cpu().numpy() for share in result)
            found = [summarise(losses, correct, probe["scored"])]
        dist.broadcast_object_list(
            found,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
            device=device(),
        )
        return found[0]


def _gather_rows(share: torch.Tensor) -> torch.Tensor:
    """Complete rows float32 [n, s] from the shares [n, s / ranks] of the context-parallel ranks."""
    group = parallel_state.get_context_parallel_group()
    shares = [torch.empty(share.shape, device=share.device) for _ in range(group.size())]
    dist.all_gather(shares, share.float(), group=group)
    joined = torch.cat(shares, 1)
    order = rank_order((0, joined.shape[1]), group.size()).to(share.device)
    return torch.empty_like(joined).index_copy_(1, order, joined)


def _as_micro_batches(probe: dict) -> list[dict[str, torch.Tensor]]:
    """One row per micro-batch, in the form of a training batch; the last position has no target."""
    batches = []
    for tokens, positions in zip(probe["tokens"], probe["position_ids"], strict=True):
        row = torch.from_numpy(tokens)[None]
        batches.append({"tokens": row, "labels": row.roll(-1, 1), "position_ids": torch.from_numpy(positions)[None]})
    return batches
