"""The recipe's data as the loop wants it: a rank's micro-batches of a global batch, on its device."""

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from endprompt_megatron.common.files import write_json
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.samples.batches import MicroBatches
from endprompt_megatron.data.samples.consumed import SEEN_FILE, seen
from endprompt_megatron.data.samples.dataset import sources_in
from endprompt_megatron.data.samples.of_recipe import datasets_of
from endprompt_megatron.data.samples.packed import PackedDataset, context_tokens
from endprompt_megatron.distributed.runtime import device, print_rank_zero
from endprompt_megatron.model.context_parallel import zigzag_slice
from endprompt_megatron.model.shape import ModelShape

MicroBatch = dict[str, torch.Tensor]


class Feed:
    """Training and validation samples of a run.  Raises InputError if the data does not fit the recipe."""

    def __init__(self, recipe: Recipe, where: str, shape: ModelShape) -> None:
        self.recipe = recipe
        t = recipe.train
        rows = t.micro_batch_size * parallel_state.get_data_parallel_world_size()
        # With a virtual pipeline a schedule takes a multiple of the pipeline's stages.
        rows *= parallel_state.get_pipeline_model_parallel_world_size() if recipe.parallel.virtual_pipeline else 1
        self.valid_samples = max(t.valid_samples // rows, 1) * rows
        valid_samples = self.valid_samples if recipe.data.valid is not None else 0
        cache = recipe.data.cache or recipe.run_dir / "index"
        self.train, self.valid = datasets_of(recipe, where, shape.vocab_size, cache, valid_samples)
        for source in sources_in(self.train):
            if isinstance(source, PackedDataset):
                print_rank_zero(source.describe())

    def global_batch(self, consumed_samples: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch after `consumed_samples`."""
        return self._read(self.train, consumed_samples, self.recipe.train.global_batch_size)

    def validation_batch(self) -> list[MicroBatch]:
        """This rank's micro-batches of the held-out samples, the same at every call."""
        return self._read(self.valid, 0, self.valid_samples)

    def held_out_tokens(self) -> np.ndarray:
        """Context tokens of the held-out samples, one after the other, int64."""
        samples = (self.valid[index] for index in range(min(len(self.valid), self.valid_samples)))
        if self.recipe.data.packing == "documents":
            return torch.cat([context_tokens(sample) for sample in samples]).numpy()
        contexts = [sample["tokens"][: int((~sample["prompt_mask"]).sum())] for sample in samples]
        return torch.cat(contexts).numpy()

    def write_seen(self, consumed_samples: int) -> None:
        """Write RUN/data_seen.json: what the first `consumed_samples` samples of the run were made of (consumed.py)."""
        write_json(self.recipe.run_dir / SEEN_FILE, seen(self.train, consumed_samples))

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
        # One row of rotary angles serves the whole micro-batch, which is what fused RoPE takes.
        batch = {**batch, "position_ids": positions[:1]}
    # Where packed sequences begin stays on the host, which reads it: LlamaModel passes it on.
    return {
        key: value if key == "cu_seqlens" else value.to(device(), non_blocking=True) for key, value in batch.items()
    }
