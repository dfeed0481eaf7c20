"""The default engine: a Hugging Face directory in transformers, on one device.

Two things are easy to get wrong and are settled here once:

* transformers, given `attention_mask=None`, no cache and position ids that jump, takes the row for several packed
  sequences and hides the context from the tail (`find_packed_sequence_indices` in its masking_utils.py).  Every
  forward here passes an attention mask of ones and explicit position ids.
* The logits of a 64K input in float32 are larger than the model.  Only the scored rows meet the output layer, a
  few hundred at a time.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.base import (
    Answer,
    Branch,
    Ended,
    branch_alone,
    checked_dtype,
    checked_tokens,
)
from endprompt_megatron.model.shape import read_shape

if TYPE_CHECKING:
    import torch


class TransformersEngine:
    """A LLaMA-family Hugging Face directory in transformers, on one device.

    Inputs up to `whole` tokens are read in one forward: causal attention without a mask tensor is the quickest and
    needs memory linear in the length.  Longer ones are read in chunks of `chunk` tokens through a KV cache.
    """

    def __init__(
        self,
        directory: Path | str,
        device: "torch.device | str",
        *,
        dtype: str = "bfloat16",
        whole: int = 32768,
        chunk: int = 4096,
    ) -> None:
        """Load the model.  Raises InputError for a directory, weights or dtype that cannot be used."""
        import torch

        checked_dtype(dtype)
        self.directory = Path(directory)
        self.shape = read_shape(directory)
        self.device = torch.device(device)
        self.dtype = dtype
        self.whole, self.chunk = whole, chunk
        started = time.monotonic()
        self.model = _load(self.directory, getattr(torch, dtype)).to(self.device).eval()
        self.load_seconds = time.monotonic() - started
        self.rope = dict(self.model.config.rope_parameters or {})
        ends = self.model.generation_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends]) - {None}
        if self.shape.rope.follows_length:
            # Keys cached from an earlier chunk would carry stale frequencies.
            self.whole = 2**62

    def token_losses(
        self, tokens: np.ndarray, position_ids: np.ndarray | None = None, *, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Engine."""
        import torch

        tokens = self._checked(tokens)
        if position_ids is not None and len(tokens) > 1 and self.shape.rope.follows_length:
            # transformers takes the frequencies of the longest row for all of them.
            rows = [
                self.token_losses(row[None], places[None], last=last)
                for row, places in zip(tokens.cpu().numpy(), np.asarray(position_ids), strict=True)
            ]
            return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))
        if position_ids is not None:
            position_ids = torch.as_tensor(np.asarray(position_ids, dtype=np.int64), device=self.device)
        count = tokens.shape[1] - 1 if last is None else min(last, tokens.shape[1] - 1)
        with torch.inference_mode():
            # The last token predicts nothing inside the input, so its row is not scored.
            hidden, _ = self._read(tokens, position_ids, keep=count + 1)
            logprobs, ranks = self._score(hidden[:, :-1], tokens[:, -count:])
        return -logprobs.cpu().numpy(), ranks.cpu().numpy() == 0

    def branch_losses(self, text: np.ndarray, branches: list[Branch]) -> list[tuple[np.ndarray, np.ndarray]]:
        """See base.branch_losses.  The text is read once, through a KV cache that every branch leaves as it was."""
        import torch
        from transformers import DynamicCache

        if self.shape.rope.follows_length:  # keys of the text would carry the frequencies of another length
            return [branch_alone(self, text, branch) for branch in branches]
        tokens, read = self._checked(text[None]), 0
        self._reset_rope()
        cache = DynamicCache(config=self.model.config)
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        with torch.inference_mode():
            for place in sorted(range(len(branches)), key=lambda place: branches[place].after):
                branch = branches[place]
                while read < branch.after:
                    end = min(read + self.chunk, branch.after)
                    self._step(tokens[:, read:end], cache, read)
                    read = end
                ids = self._checked(np.asarray([branch.ids]))
                hidden, _ = self._step(ids[:, :-1], cache, read)
                cache.crop(-(len(branch.ids) - 1))
                logprobs, ranks = self._score(hidden[:, -branch.scored :], ids[:, -branch.scored :])
                found[place] = (-logprobs[0].cpu().numpy(), ranks[0].cpu().numpy() == 0)
        return [found[place] for place in range(len(branches))]

    def generate(self, prompt_ids: list[int], max_new_tokens: int, ended: Ended | None = None) -> list[int]:
        """See Engine."""
        return self._answer(prompt_ids, [], max_new_tokens, ended).generated

    def answer(self, prompt_ids: list[int], expected: list[int], max_new_tokens: int) -> Answer:
        """See Engine."""
        return self._answer(prompt_ids, expected, max_new_tokens, None)

    def _answer(self, prompt_ids: list[int], expected: list[int], max_new_tokens: int, ended: Ended | None) -> Answer:
        import torch

        tokens = self._checked(np.asarray([prompt_ids]))
        length = tokens.shape[1]
        with torch.inference_mode():
            hidden, cache = self._read(tokens, None, keep=1, cached=True)
            logprobs, ranks = np.zeros(0, np.float32), np.zeros(0, np.int64)
            if expected:
                truth = self._checked(np.asarray([expected]))
                rows = hidden
                if len(expected) > 1:
                    more, _ = self._step(truth[:, :-1], cache, length)
                    rows = torch.cat([hidden, more], dim=1)
                    cache.crop(-(len(expected) - 1))
                scored = self._score(rows, truth)
                logprobs, ranks = scored[0][0].cpu().numpy(), scored[1][0].cpu().numpy()
            generated: list[int] = []
            for place in range(max_new_tokens):
                choice = int(self.model.lm_head(hidden[:, -1]).float().argmax())
                if choice in self.end_ids:
                    break
                generated.append(choice)
                if ended is not None and ended(generated):
                    break
                if place + 1 < max_new_tokens:
                    hidden, _ = self._step(torch.tensor([[choice]], device=self.device), cache, length + place)
        return Answer(generated, logprobs, ranks)

    def describe(self) -> dict:
        """What was measured, for results.json."""
        return {
            "engine": "transformers",
            "path": str(self.directory),
            "parameters": self.shape.parameters,
            "window": self.shape.window,
            "rope": self.rope,
            "dtype": self.dtype,
            "device": str(self.device),
            "load_seconds": round(self.load_seconds, 2),
        }

    def _checked(self, tokens: np.ndarray) -> "torch.Tensor":
        """Tokens on the device, [b, s].  Raises InputError for an id the model does not have."""
        import torch

        return torch.as_tensor(checked_tokens(tokens, self.shape.vocab_size, self.directory), device=self.device)

    def _read(self, tokens, position_ids, *, keep: int, cached: bool = False):
        """Final hidden states of the last `keep` tokens [b, keep, hidden], and the KV cache if one was used."""
        import torch
        from transformers import DynamicCache

        self._reset_rope()
        length = tokens.shape[1]
        size = length if length <= self.whole else self.chunk
        cache = DynamicCache(config=self.model.config) if cached or size < length else None
        kept = []
        for start in range(0, length, size):
            chunk = tokens[:, start : start + size]
            positions = None if position_ids is None else position_ids[:, start : start + size]
            hidden, cache = self._step(chunk, cache, start, positions)
            kept.append(hidden[:, max(0, length - keep - start) :])
        return (kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)), cache

    def _step(self, tokens, cache, start: int, position_ids=None):
        """Hidden states of `tokens` [b, n], which follow `start` tokens that are in the cache."""
        import torch

        batch, count = tokens.shape
        if position_ids is None:
            position_ids = torch.arange(start, start + count, device=self.device).expand(batch, -1)
        output = self.model.model(
            input_ids=tokens,
            attention_mask=torch.ones(batch, start + count, dtype=torch.int64, device=self.device),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state, cache

    def _score(self, hidden, targets):
        """Log probability (float32) and rank (int64) of `targets` [b, n] given hidden states [b, n, hidden]."""
        import torch

        batch, count, width = hidden.shape
        rows, truth = hidden.reshape(-1, width), targets.reshape(-1)
        logprobs, ranks = [], []
        for start in range(0, batch * count, 512):
            logits = self.model.lm_head(rows[start : start + 512]).float()
            of_truth = logits.gather(1, truth[start : start + 512, None])
            logprobs.append(of_truth[:, 0] - logits.logsumexp(dim=-1))
            # Equal logits are common in bfloat16; greedy decoding takes the first of them.
            earlier = torch.arange(logits.shape[1], device=self.device) < truth[start : start + 512, None]
            ranks.append(((logits > of_truth) | ((logits == of_truth) & earlier)).sum(dim=-1))
        logprobs = torch.cat(logprobs) if logprobs else rows.new_zeros(0, dtype=torch.float32)
        ranks = torch.cat(ranks) if ranks else truth.new_zeros(0)
        if not bool(torch.isfinite(logprobs).all()):
            raise InputError(
                f"{self.directory}: the model's output is not finite in {self.dtype}; "
                "try --dtype float32, and if that fails as well the weights are broken"
            )
        return logprobs.view(batch, count), ranks.view(batch, count)

    def _reset_rope(self) -> None:
        """Forget how long earlier inputs were: dynamic RoPE keeps the longest one's frequencies otherwise."""
        rotary = self.model.model.rotary_emb
        if self.shape.rope.type == "dynamic":
            rotary.register_buffer("inv_freq", rotary.original_inv_freq.to(self.device).clone(), persistent=False)
            rotary.max_seq_len_cached = rotary.original_max_seq_len


def _load(directory: Path, dtype: "torch.dtype"):
    """The model in eval dtype.  Raises InputError for missing or broken weights."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{directory}: the model cannot be loaded ({reason[:200]})") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would fill them with random numbers and go on.
        raise InputError(f"{directory}: {len(missing)} weights are missing, among them {missing[0]}; convert it again")
    return model
