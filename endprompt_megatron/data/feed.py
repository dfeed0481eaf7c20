"""The recipe's data as the loop wants it: a rank's micro-batches of a global batch, on its device."""

import re
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from endprompt_megatron.config import Recipe
from endprompt_megatron.data.batch import MicroBatches, zigzag_slice
from endprompt_megatron.data.dataset import Blend, build_datasets
from endprompt_megatron.errors import InputError
from endprompt_megatron.positions import WITH_PROMPT
from endprompt_megatron.prompts import tokenise_prompts
from endprompt_megatron.runtime import device
from endprompt_megatron.shape import ModelShape

MicroBatch = dict[str, torch.Tensor]


class Feed:
    """Training and validation samples of a run.  Raises InputError if the data does not fit the recipe."""

    def __init__(self, recipe: Recipe, where: str, shape: ModelShape) -> None:
        self.recipe = recipe
        c, t = recipe.context, recipe.train
        rows = t.micro_batch_size * parallel_state.get_data_parallel_world_size()
        # With a virtual pipeline a schedule takes a multiple of the pipeline's stages.
        rows *= parallel_state.get_pipeline_model_parallel_world_size() if recipe.parallel.virtual_pipeline else 1
        self.valid_samples = max(t.valid_samples // rows, 1) * rows
        self.train, self.valid = build_datasets(
            train=blend(recipe.data.train, f"{where}: data.train"),
            valid=_valid(recipe.data.valid, where),
            physical_len=c.physical,
            method=c.method,
            target_len=c.target,
            prompts=tokenise_prompts(recipe.model.hf, list(c.prompts)) if c.method in WITH_PROMPT else [],
            prompt_loss_weight=c.prompt_loss_weight,
            seed=t.seed,
            chunks=c.chunks,
            train_samples=t.steps * t.global_batch_size,
            valid_samples=self.valid_samples if recipe.data.valid else 0,
            cache_dir=recipe.data.cache or recipe.run_dir / "index",
            vocab_size=shape.vocab_size,
            tokenizer=recipe.model.hf,
        )

    def global_batch(self, consumed_samples: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch after `consumed_samples`."""
        return self._read(self.train, consumed_samples, self.recipe.train.global_batch_size)

    def validation_batch(self) -> list[MicroBatch]:
        """This rank's micro-batches of the held-out samples, the same at every call."""
        return self._read(self.valid, 0, self.valid_samples)

    def held_out_tokens(self) -> np.ndarray:
        """Context tokens of the held-out samples, one after the other, int64."""
        samples = (self.valid[index] for index in range(min(len(self.valid), self.valid_samples)))
        contexts = [sample["tokens"][: int((~sample["prompt_mask"]).sum())] for sample in samples]
        return torch.cat(contexts).numpy()

    def on_this_rank(self, batch: MicroBatch) -> MicroBatch:
        """A whole micro-batch [b, s], sliced for context parallelism, on the device."""
        rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        return _to_device({key: zigzag_slice(value, rank, size, dim=1) for key, value in batch.items()})

    def _read(self, dataset: Any, consumed: int, count: int) -> list[MicroBatch]:
        rows, replicas = self.recipe.train.micro_batch_size, parallel_state.get_data_parallel_world_size()
        batches = MicroBatches(
            dataset,
            consumed,
            rows,
            parallel_state.get_data_parallel_rank(),
            replicas,
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
        )
        return [_to_device(next(batches)) for _ in range(count // (rows * replicas))]


def _to_device(batch: MicroBatch) -> MicroBatch:
    positions = batch["position_ids"]
    if bool((positions == positions[:1]).all()):
        # One row of phases serves the whole micro-batch, which is what fused RoPE takes.
        batch = {**batch, "position_ids": positions[:1]}
    return {key: value.to(device(), non_blocking=True) for key, value in batch.items()}


def blend(value: Any, key: str) -> Blend:
    """data.train or data.valid as (PREFIX, weight) pairs.  Raises InputError for anything else."""
    if isinstance(value, str):
        return [(value, 1.0)]
    if isinstance(value, list) and value and all(isinstance(prefix, str) for prefix in value):
        return [(prefix, 1.0) for prefix in value]
    if isinstance(value, dict) and value:
        weights = list(value.values())
        if all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights):
            return [(str(prefix), float(weight)) for prefix, weight in value.items()]
    raise InputError(f"{key}={value} should be a PREFIX, a list of them, or a mapping from PREFIX to weight")


def _valid(value: Any, where: str) -> Blend | str | None:
    if value is None or (isinstance(value, str) and re.fullmatch(r"\d+\s*,\s*\d+", value)):
        return value
    return blend(value, f"{where}: data.valid")
