"""The Megatron model in place: tensor and pipeline parallel, from a training checkpoint, nothing exported.

All ranks of a model call every method together, with the same arguments, and get the same answers.  Inputs go through
the pipeline in chunks, each attending to the keys and values of those before it, which a layer's attention keeps; so
no rank ever holds the logits, or the scores, of a whole long input.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from endprompt_megatron.checkpoint.torch_dist import Checkpoint
from endprompt_megatron.checkpoint.weights import read_objects, read_weights, weights_of
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.config.recipe import LongLora, Parallel, Precision
from endprompt_megatron.convert.direct import weights_at
from endprompt_megatron.convert.lora_merge import longlora_of
from endprompt_megatron.distributed import runtime
from endprompt_megatron.evaluate.engines.base import Answer, Ended, checked_tokens, end_ids
from endprompt_megatron.method.rope import transformers_config
from endprompt_megatron.model.shape import ModelShape, read_shape

_ROWS = 512  # of logits that are scored at a time, in float32
WHOLE = 2**62


def start(tensor: int, pipeline: int | None, config: Path) -> None:
    """Bring this rank up in a layout of `tensor` x `pipeline` (None: what the ranks leave); the rest is data parallel.

    Raises InputError for a layout that the model in `config` or the number of ranks does not allow.
    """
    ranks, shape = runtime.launched_as().world_size, read_shape(config)
    for key, count in (("num_attention_heads", shape.num_heads), ("num_key_value_heads", shape.num_kv_heads)):
        if count % tensor:
            raise InputError(f"--tensor {tensor}: does not divide {key}={count}")
    if ranks % tensor:
        raise InputError(f"--tensor {tensor}: does not divide the {ranks} ranks; start a multiple of it (--processes)")
    stages = pipeline or max(n for n in range(1, ranks // tensor + 1) if not (ranks // tensor) % n and _fits(shape, n))
    if ranks % (tensor * stages):
        raise InputError(
            f"--tensor {tensor} --pipeline {stages}: {tensor * stages} do not divide the {ranks} ranks; "
            "start a multiple of it (--processes)"
        )
    if not _fits(shape, stages):
        raise InputError(f"--pipeline {stages}: does not divide num_hidden_layers={shape.num_layers}")
    runtime.start(tensor, stages, None, 1, 0)


def _fits(shape: ModelShape, stages: int) -> bool:
    return shape.num_layers % stages == 0


class MegatronEngine:
    """A checkpoint, or a Hugging Face directory, in Megatron-Core.  `start` comes first, on all ranks."""

    def __init__(self, weights: Path, config: Path, *, dtype: str = "bfloat16", chunk: int = 2048) -> None:
        """`config`: the Hugging Face config beside the weights.  Raises InputError for weights that cannot be used."""
        from endprompt_megatron.model.llama import build_chunks

        if dtype not in ("bfloat16", "float32"):
            raise InputError(f"--dtype {dtype}: Megatron's models are built in bfloat16 or float32")
        self.directory, self.shape, self.dtype = weights, read_shape(config), dtype
        started = time.monotonic()
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        exported = read_json(config / "config.json", "a Hugging Face config")
        held = weights_at(weights, self.shape, "--hf" if weights == config else "--megatron")
        # With LoRA's adapters, if it was trained with them.
        longlora = LongLora(**longlora_of(held.directory)) if isinstance(held, Checkpoint) else LongLora()
        (self.model,) = models = build_chunks(
            self.shape,
            exported,
            Parallel(tensor=tensor, pipeline=pipeline),
            Precision(dtype=dtype),
            longlora,
            shared_positions=True,
        )
        read_weights(weights_of(models), held)
        read_objects(models, held)
        self.model.to(runtime.device()).eval()
        self.caches = []
        for layer in self.model.decoder.layers:
            layer.self_attention.core_attention = cache = CachedAttention(self.model.config.softmax_scale)
            self.caches.append(cache)
        self.load_seconds = time.monotonic() - started
        self.end_ids = end_ids(config)
        self.rope = dict(transformers_config(exported).rope_parameters or {})
        # Frequencies that follow the input's length: keys of an earlier chunk would carry stale ones.
        self.chunk = WHOLE if self.shape.rope.follows_length else chunk

    def token_losses(
        self, tokens: np.ndarray, position_ids: np.ndarray | None = None, *, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Engine."""
        tokens = self._checked(tokens)
        count = tokens.shape[1] - 1 if last is None else min(last, tokens.shape[1] - 1)
        if position_ids is not None:
            position_ids = torch.as_tensor(np.asarray(position_ids, dtype=np.int64), device=tokens.device)
        # The last token predicts nothing inside the input, but belongs to its length: any target will do for it.
        targets = torch.cat((tokens[:, -count:], tokens[:, :1]), dim=1)
        (logprobs, ranks), _ = self._read(tokens, position_ids, targets, tokens.shape[1])
        return -logprobs[:, :-1], ranks[:, :-1] == 0

    def generate(self, prompt_ids: list[int], max_new_tokens: int, ended: Ended | None = None) -> list[int]:
        """See Engine."""
        return self._answer(prompt_ids, [], max_new_tokens, ended).generated

    def answer(self, prompt_ids: list[int], expected: list[int], max_new_tokens: int) -> Answer:
        """See Engine."""
        return self._answer(prompt_ids, expected, max_new_tokens, None)

    def describe(self) -> dict:
        """What was measured, for results.json."""
        return {
            "engine": "megatron",
            "path": str(self.directory),
            "parameters": self.shape.parameters,
            "window": self.shape.window,
            "rope": self.rope,
            "dtype": self.dtype,
            "device": str(runtime.device()),
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "load_seconds": round(self.load_seconds, 2),
        }

    def _answer(self, prompt_ids: list[int], expected: list[int], max_new_tokens: int, ended: Ended | None) -> Answer:
        tokens = self._checked(np.asarray([prompt_ids]))
        length, room = tokens.shape[1], tokens.shape[1] + max(max_new_tokens, len(expected))
        truth = self._checked(np.asarray([expected])) if expected else tokens[:, :0]
        scored, choice = self._read(tokens, None, truth[:, :1], room)
        if len(expected) > 1:
            more, _ = self._read_chunk(truth[:, :-1], self._places(1, length, len(expected) - 1), truth[:, 1:])
            scored = tuple(np.concatenate(both, axis=1) for both in zip(scored, more, strict=True))
            for cache in self.caches:
                cache.length = length
        generated: list[int] = []
        for place in range(max_new_tokens):
            if choice in self.end_ids:
                break
            generated.append(choice)
            if (ended is not None and ended(generated)) or place + 1 == max_new_tokens:
                break
            token = torch.tensor([[choice]], device=tokens.device)
            _, choice = self._read_chunk(token, self._places(1, length + place, 1), token[:, :0])
        return Answer(generated, scored[0][0], scored[1][0])

    def _checked(self, tokens: np.ndarray) -> Tensor:
        return torch.as_tensor(checked_tokens(tokens, self.shape.vocab_size, self.directory), device=runtime.device())

    @staticmethod
    def _places(rows: int, begin: int, count: int) -> Tensor:
        return torch.arange(begin, begin + count, device=runtime.device()).expand(rows, -1)

    def _read(
        self, tokens: Tensor, position_ids: Tensor | None, targets: Tensor, room: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """Read an input [b, s] from its beginning; see _read_chunk.  `targets` [b, n] are those of its last n tokens.

        `room`: tokens that the caches are to take, what is generated after them included.
        """
        rows, length = tokens.shape
        for cache in self.caches:
            cache.begin(room)
        found, choice, first = [], -1, length - targets.shape[1]
        for start in range(0, length, self.chunk):
            chunk = tokens[:, start : start + self.chunk]
            end = start + chunk.shape[1]
            positions = self._places(rows, start, end - start) if position_ids is None else position_ids[:, start:end]
            scored, choice = self._read_chunk(chunk, positions, targets[:, max(0, start - first) : max(0, end - first)])
            found.append(scored)
        return tuple(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)), choice

    def _read_chunk(
        self, tokens: Tensor, position_ids: Tensor, targets: Tensor
    ) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """Read tokens [b, n] that follow those in the caches, through all stages.

        Returns log probabilities (float32) and ranks (int64) of `targets` [b, m], which the last m tokens predict,
        and what greedy decoding chooses after the first row.  Raises InputError for output that is not finite.
        """
        rows, count = targets.shape
        if bool((position_ids == position_ids[:1]).all()):
            position_ids = position_ids[:1]  # one row of rotary angles, which fused RoPE takes
        found: list[Tensor] = []

        def forward(_: object, model: torch.nn.Module) -> tuple[Tensor, object]:
            logits = model(tokens, position_ids)

            def report(logits: Tensor) -> tuple[Tensor, Tensor, dict]:
                found.extend(self._score(model.without_padding(logits), targets))
                return logits.new_zeros(()), torch.ones((), dtype=torch.int, device=logits.device), {}

            return logits, report

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=None,
                model=self.model,
                num_microbatches=1,
                seq_length=tokens.shape[1],
                micro_batch_size=rows,
                forward_only=True,
            )
        device = tokens.device
        if not found:
            empty = (rows, count)
            found = [torch.empty(empty, device=device), torch.empty(empty, dtype=torch.int64, device=device)]
            found.append(torch.empty((), dtype=torch.int64, device=device))
        self._from_last_stage(found)
        logprobs, ranks, choice = (part.cpu() for part in found)
        if not bool(torch.isfinite(logprobs).all()):
            raise InputError(
                f"{self.directory}: the model's output is not finite in {self.dtype}; "
                "try --dtype float32, and if that fails as well the weights are broken"
            )
        return (logprobs.numpy(), ranks.numpy()), int(choice)

    @staticmethod
    def _from_last_stage(values: list[Tensor]) -> None:
        """Only the last pipeline stage knows; the others learn it."""
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            for value in values:
                dist.broadcast(value, src=source, group=group)

    def _score(self, logits: Tensor, targets: Tensor) -> list[Tensor]:
        """Log probabilities and ranks of `targets` [b, m], and the greedy choice; logits [b, n, v / TP]."""
        rows, count = targets.shape
        group = parallel_state.get_tensor_model_parallel_group()
        here = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]  # the first id of this rank
        parts = [
            _scored(part.float(), truth, here, group)
            for part, truth in zip(
                logits[:, logits.shape[1] - count :].flatten(0, 1).split(_ROWS),
                targets.flatten().split(_ROWS),
                strict=True,
            )
            if len(truth)
        ]
        logprobs = torch.cat([part[0] for part in parts]) if parts else logits.new_zeros(0, dtype=torch.float32)
        ranks = torch.cat([part[1] for part in parts]) if parts else targets.new_zeros(0)
        best, place = logits[0, -1].float().max(dim=-1)
        both = torch.stack([best.double(), (place + here).double()])
        gathered = [torch.empty_like(both) for _ in range(group.size())]
        dist.all_gather(gathered, both, group=group)
        # Equal logits are common in bfloat16; greedy decoding takes the first of them.
        choice = max(gathered, key=lambda pair: (float(pair[0]), -float(pair[1])))[1].long()
        return [logprobs.view(rows, count), ranks.view(rows, count), choice]


def _scored(logits: Tensor, truth: Tensor, here: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log probability (float32) and rank (int64) of `truth` [n]; logits [n, v / TP] float32, from id `here` on."""
    best = logits.max(dim=-1).values
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    total = (logits - best[:, None]).exp().sum(dim=-1)
    dist.all_reduce(total, group=group)
    place = (truth - here).clamp(0, logits.shape[1] - 1)
    held = (truth >= here) & (truth < here + logits.shape[1])
    of_truth = logits.gather(1, place[:, None])[:, 0].masked_fill(~held, float("-inf"))
    dist.all_reduce(of_truth, op=dist.ReduceOp.MAX, group=group)
    earlier = torch.arange(here, here + logits.shape[1], device=logits.device) < truth[:, None]
    ranks = ((logits > of_truth[:, None]) | ((logits == of_truth[:, None]) & earlier)).sum(dim=-1)
    dist.all_reduce(ranks, group=group)
    return of_truth - best - total.log(), ranks


class CachedAttention(torch.nn.Module):
    """Causal core attention of one layer that keeps keys and values: those that come see all that came before.

    In the place of Megatron's, with Transformer Engine or without: the cache is the same on both.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.room, self.length = scale, 0, 0
        self.held: Tensor | None = None  # [2, room, b, kv heads, d]

    def begin(self, room: int) -> None:
        """A new input, which together with what is generated has `room` tokens."""
        self.room, self.length, self.held = room, 0, None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_unused: object, **_ignored: object) -> Tensor:
        """query [s, b, h, d], key and value [s, b, kv heads, d] -> [s, b, h * d]."""
        count, batch, heads, _ = query.shape
        if self.held is None:
            self.held = key.new_empty(2, self.room, *key.shape[1:])
        begin, self.length = self.length, self.length + count
        self.held[0, begin : self.length], self.held[1, begin : self.length] = key, value
        key, value = self.held[:, : self.length]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        options: dict = {"scale": self.scale}
        if count == 1:
            options["enable_gqa"] = heads != key.shape[1]  # nothing is masked, nothing copied
        else:
            key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
            options |= {"attn_mask": causal_lower_right(count, self.length)} if begin else {"is_causal": True}
        context = F.scaled_dot_product_attention(query, key, value, **options)
        return context.permute(2, 0, 1, 3).reshape(count, batch, -1)
