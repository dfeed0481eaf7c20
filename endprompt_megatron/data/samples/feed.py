"""What the training loop reads: a rank's micro-batches of each global batch, on its device."""

from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from endprompt_megatron.common.files import write_json
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.samples.batches import MicroBatches
from endprompt_megatron.data.samples.dataset import Dataset, consumed, sources_in
from endprompt_megatron.data.samples.identity import identity_of
from endprompt_megatron.data.samples.of_recipe import datasets_of
from endprompt_megatron.data.samples.packed import PackedDataset, context_tokens
from endprompt_megatron.distributed.runtime import device, is_rank_zero, print_rank_zero
from endprompt_megatron.model.context_parallel import zigzag_slice

CONSUMED_FILE = "data_seen.json"

MicroBatch = dict[str, torch.Tensor]


def open_feed(recipe: Recipe, where: str, vocab_size: int) -> "Feed":
    """The samples of a recipe; `vocab_size` is the model's.  Raises InputError if the data does not fit the recipe."""
    t = recipe.train
    rows = t.micro_batch_size * parallel_state.get_data_parallel_world_size()
    # With a virtual pipeline a schedule takes a multiple of the pipeline's stages.
    rows *= parallel_state.get_pipeline_model_parallel_world_size() if recipe.parallel.virtual_pipeline else 1
    valid_samples = max(t.valid_samples // rows, 1) * rows if recipe.data.valid is not None else 0
    cache = recipe.data.cache or recipe.run_dir / "index"
    train, valid = datasets_of(recipe, where, vocab_size, cache, valid_samples)
    for source in sources_in(train):
        if isinstance(source, PackedDataset):
            print_rank_zero(source.describe())
    identity = identity_of(recipe) if is_rank_zero() else None
    return Feed(train, valid, t.global_batch_size, t.micro_batch_size, identity)


class Feed:
    """Training and validation samples of a run; `valid`, None without, holds the samples of one validation.

    `identity`: on the first rank, what is trained on (identity.py).
    """

    def __init__(
        self,
        train: Dataset,
        valid: Dataset | None,
        global_batch_size: int,
        micro_batch_size: int,
        identity: list[dict] | None = None,
    ) -> None:
        self.train, self.valid, self.identity = train, valid, identity
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size

    def global_batch(self, consumed_samples: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch after `consumed_samples`."""
        return self._read(self.train, consumed_samples, self.global_batch_size)

    def validation_batch(self) -> list[MicroBatch]:
        """This rank's micro-batches of the held-out samples, the same at every call."""
        return self._read(self.valid, 0, len(self.valid))

    def held_out_tokens(self) -> np.ndarray:
        """Context tokens of the held-out samples, one after the other, int64."""
        contexts = []
        for index in range(len(self.valid)):
            sample = self.valid[index]
            if "cu_seqlens" in sample:
                contexts.append(context_tokens(sample))
            else:
                contexts.append(sample["tokens"][: int((~sample["prompt_mask"]).sum())])
        return torch.cat(contexts).numpy()

    def write_consumed(self, run_dir: Path, consumed_samples: int) -> None:
        """Write RUN/data_seen.json: what the first `consumed_samples` samples of the run were made of."""
        write_json(run_dir / CONSUMED_FILE, consumed(self.train, consumed_samples))

    def on_this_rank(self, batch: MicroBatch) -> MicroBatch:
        """A complete micro-batch [b, s], sliced for context parallelism, on the device."""
        rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        return _to_device({key: zigzag_slice(value, rank, size, dim=1) for key, value in batch.items()})

    def _read(self, dataset: Dataset, consumed_samples: int, count: int) -> list[MicroBatch]:
        replicas = parallel_state.get_data_parallel_world_size()
        batches = MicroBatches(
            dataset,
            consumed_samples,
            self.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            replicas,
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
        )
        return [_to_device(next(batches)) for _ in range(count // (self.micro_batch_size * replicas))]


def _to_device(batch: MicroBatch) -> MicroBatch:
    positions = batch["position_ids"]
    if bool((positions == positions[:1]).all()):
        # One row of rotary angles serves the whole micro-batch, which is what fused RoPE takes.
        batch = {**batch, "position_ids": positions[:1]}
    # Where packed sequences begin stays on the host, which reads it: LlamaModel passes it on.
    return {
        key: value if key == "cu_seqlens" else value.to(device(), non_blocking=True) for key, value in batch.items()
    }
