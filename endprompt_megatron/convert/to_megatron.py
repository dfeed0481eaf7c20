"""Hugging Face directory -> Megatron-Core checkpoint that a model of any parallel layout can load."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt_megatron.convert import layout, llama, torch_dist
from endprompt_megatron.convert.hf_files import HfWeights
from endprompt_megatron.convert.progress import byte_progress, in_words
from endprompt_megatron.errors import InputError
from endprompt_megatron.files import refuse_existing, staged_directory
from endprompt_megatron.shape import ModelShape, read_shape


@dataclass(frozen=True)
class Written:
    """What a conversion wrote: where, how many tensors and bytes of weights, their dtype, and the seconds it took."""

    path: Path
    tensors: int
    bytes: int
    dtype: str
    seconds: float

    def __str__(self) -> str:
        return f"wrote {self.path}: {self.tensors} tensors, {in_words(self.bytes)}, {self.dtype}, {self.seconds:.1f} s"


def convert_hf_to_megatron(hf: Path, out: Path, dtype: str | None = None) -> Written:
    """Convert the weights in `hf` and write iteration 0 of a new checkpoint directory `out`.

    `dtype` ("bfloat16", "float16", "float32") casts; None keeps the weights to the bit.  Everything is checked
    before anything is written, and `out` appears when it is whole.  Raises InputError.
    """
    started = time.monotonic()
    hf, out = Path(hf), Path(out)
    shape = read_shape(hf)
    refuse_existing(out, "--out")
    layout.check_tokenizer(hf, shape.vocab_size)
    pieces = list(llama.pieces(shape))
    dtype = layout.parse_dtype(dtype)
    weights = HfWeights(hf)
    found = weights.check(pieces, shape.tied_embeddings)
    if dtype is None and len(found) > 1:
        examples = ", ".join(f"{tensor} {name}" for name, tensor in sorted(found.items()))
        raise InputError(f"{hf}: tensors of several dtypes ({examples}); choose one with --dtype")
    dtype = dtype or next(iter(found))
    torch_dtype = getattr(torch, dtype)
    total = sum(piece.elements for piece in pieces) * torch_dtype.itemsize
    layout.require_space(out, total, "--out")

    with byte_progress(total, "converting") as advance, staged_directory(out) as staging:

        def load(piece: llama.Piece) -> torch.Tensor:
            tensor = llama.join(piece, [weights.get(name).to(torch_dtype) for name, _ in piece.hf])
            advance(tensor.nbytes)
            return tensor

        stored = [
            torch_dist.Stored(
                piece.key, piece.global_shape, piece.offset, piece.shape, torch_dtype, functools.partial(load, piece)
            )
            for piece in pieces
        ]
        directory = layout.iteration_dir(staging, 0)
        directory.mkdir()
        torch_dist.write(directory, stored, dict.fromkeys(_extra_states(shape)))
        layout.copy_hf_files(hf, directory / layout.HF_DIRECTORY)
        layout.write_manifest(
            directory,
            step=0,
            consumed_samples=0,
            recipe=None,
            vocab_size=shape.vocab_size,
            dtype=dtype,
            source=hf.resolve().name,
        )
        layout.write_latest(staging, 0)
    return Written(out, sum(len(piece.hf) for piece in pieces), total, dtype, time.monotonic() - started)


def _extra_states(shape: ModelShape) -> list[str]:
    """Megatron's keys of the (empty) extra states: ShardedObjects, one a layer."""
    keys = []
    for key in llama.EXTRA_STATES:
        count = shape.num_layers if key.startswith(llama.LAYERS) else 1
        keys += [f"{key}/shard_{index}_{count}" for index in range(count)]
    return keys
