"""One physical sequence from context tokens and an end prompt: tokens, labels, positions, loss weights.

Everything about a sample except where its context comes from.  dataset.py reads the context from disk;
packed.py writes several shorter ones beside each other into a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.samples.packing import Packing
from endprompt_megatron.method.positions import context_chunks, copies, known, position_ids, segment_lengths
from endprompt_megatron.method.random_streams import PROMPT_STREAM, draws
from endprompt_megatron.method.recall import Recall


def check_vocabulary(tokens: np.ndarray, vocab_size: int | None, source: str) -> None:
    """Raise InputError for a token that the model does not know; `vocab_size` None leaves them unchecked."""
    if vocab_size is not None and (tokens.max() >= vocab_size or tokens.min() < 0):
        bad = int(tokens.max() if tokens.max() >= vocab_size else tokens.min())
        raise InputError(
            f"{source}: token id {bad} is outside the model's vocabulary of {vocab_size}; "
            "prepare the data with the model's own tokenizer"
        )


class Excerpt(NamedTuple):
    """Tokens of one document in a row: `tokens` of them from its token `first` on, `at` is where in the row."""

    document: int
    document_len: int
    first: int
    tokens: int
    at: int


@dataclass(frozen=True)
class SampleSpec:
    """What a sample is, as a recipe's context and train.seed say it.

    `prompts` are token ids.  With `recall`, that share of the samples ends with a recall prompt instead of one of
    `prompts`.  `knobs`: further arguments of positions.position_ids.
    """

    method: str
    physical_len: int
    target_len: int
    prompts: list[list[int]]
    prompt_loss_weight: float
    seed: int
    recall: Recall | None = None
    knobs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Form:
    """What samples with the same prompt have in common; `positions` is None where they differ."""

    context_len: int
    prompt: np.ndarray  # [b] int64, all copies
    weights: torch.Tensor  # [s] float32
    prompt_mask: torch.Tensor  # [s] bool
    positions: torch.Tensor | None  # [s] int64


class SampleBuilder:
    """Builds sample `index` from its context tokens.  Pure: the same (context, index) gives the same sample.

    `context_len` is the longest context that a sample takes: with prompts of different lengths a sample
    with a longer prompt takes fewer tokens, so that all have `length` = a + b.  Raises InputError (naming the recipe's
    keys) where the method, the lengths and the prompts do not go together.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self._spec, self._method, self._seed, self._recall = spec, spec.method, spec.seed, spec.recall
        self._copies = copies(spec.method, **spec.knobs)
        if not 0 <= spec.seed < 2**32:
            raise InputError(f"train.seed={spec.seed} should lie between 0 and {2**32 - 1}")
        if known(spec.method).has_prompt and not spec.prompts:
            raise InputError(f"context.prompts is empty; {spec.method} needs at least one end prompt")
        used = spec.prompts if known(spec.method).has_prompt else [[]]
        used = [] if spec.recall is not None and spec.recall.share == 1 else used
        try:
            self._forms = [self._form(prompt) for prompt in used]
            if spec.recall is not None:
                self._forms.append(self._form(spec.recall.prompt, spec.recall))
        except ValueError as error:
            raise InputError(f"context.method={spec.method}: {error}") from None
        self.context_len = max(form.context_len for form in self._forms)
        self.length = len(self._forms[0].weights)
        self.highest_prompt_id = max(int(form.prompt.max(initial=-1)) for form in self._forms)

    def _form(self, prompt: list[int], recall: Recall | None = None) -> _Form:
        spec = self._spec
        tokens = np.tile(np.array(prompt, dtype=np.int64), self._copies)
        a, b = segment_lengths(spec.method, spec.physical_len, len(tokens), spec.target_len)
        weights, mask = torch.ones(a + b), torch.zeros(a + b, dtype=torch.bool)
        # The target at i is token i + 1: the prompt's first token is the target of the last context token.
        weights[a - 1 :], mask[a - 1 :] = spec.prompt_loss_weight, True
        weights[-1], mask[-1] = 0.0, False
        if recall is not None:
            recall.places(a, 1, index=0, seed=self._seed)  # refuses a context that is too short for the span
            weights[a - 1 : -1][torch.from_numpy(recall.is_key(self._copies))] = 0.0
        positions = torch.from_numpy(self._positions(a, b, 0))
        return _Form(a, tokens, weights, mask, None if known(self._method).varies else positions)

    def _positions(self, a: int, b: int, index: int) -> np.ndarray:
        spec = self._spec
        return position_ids(spec.method, a, b, spec.target_len, index=index, seed=spec.seed, **spec.knobs)

    @property
    def prompt_lens(self) -> list[int]:
        """Tokens of each terminal segment; [0] for a method without."""
        return [len(form.prompt) for form in self._forms]

    def prompt_number(self, index: int) -> int:
        """Which of the terminal segments sample `index` ends with, drawn purely in (seed, index); recall comes last."""
        return 0 if len(self._forms) == 1 else int(self.prompt_numbers(np.array([index]))[0])

    def context_of(self, index: int) -> int:
        """Context tokens of sample `index`, as `build` makes it."""
        return self._forms[self.prompt_number(index)].context_len

    def prompt_numbers(self, indices: np.ndarray) -> np.ndarray:
        """The same for many samples at once, int64."""
        if self._recall is None:
            return draws(self._seed, indices, PROMPT_STREAM, len(self._forms))
        last = len(self._forms) - 1
        others = draws(self._seed, indices, PROMPT_STREAM, max(last, 1))
        return np.where(self._recall.chosen(indices, self._seed), last, others)

    def recalled(self, index: int) -> list[int]:
        """Where in its context the spans begin that sample `index` recalls, one for each copy; [] without recall."""
        number = self.prompt_number(index)
        if self._recall is None or number != len(self._forms) - 1:
            return []
        return self._recall.places(self._forms[number].context_len, self._copies, index=index, seed=self._seed)

    def build(self, context: np.ndarray, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`; `context` holds at least its a tokens, of any integer dtype.

        tokens, labels, position_ids int64 [s]; loss_weights float32 [s], the weight of the target at i;
        prompt_mask bool [s], whether that target is a prompt token.  The last position has no target:
        label 0, weight 0.
        """
        form = self._forms[self.prompt_number(index)]
        a = form.context_len
        tokens = np.empty(self.length, dtype=np.int64)
        tokens[:a] = context[:a]
        tokens[a:] = form.prompt
        if self._recall is not None:
            self._recall.fill(tokens, a, self.recalled(index))
        labels = np.empty(self.length, dtype=np.int64)
        labels[:-1] = tokens[1:]
        labels[-1] = 0
        if form.positions is None:
            positions = torch.from_numpy(self._positions(a, len(form.prompt), index))
        else:
            positions = form.positions.clone()
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": positions,
            "loss_weights": form.weights.clone(),
            "prompt_mask": form.prompt_mask.clone(),
        }

    def packing(self, align: int) -> Packing:
        """How documents become samples of this method in rows of `length`, each padded to a multiple of `align`.

        Raises InputError, naming the recipe's keys, where they cannot.
        """
        if known(self._method).whole_window:
            raise InputError(
                f"context.method={self._method} with data.packing=documents: a document is as long as it is, not "
                "as the target; use short with context.physical at the target's length, or stream"
            )
        if self._recall is not None:
            raise InputError(
                "context.recall.tokens with data.packing=documents: a short document has no span to recall; use stream"
            )
        # With one token a sample would have no target in its context, and a chunk is at least one token.
        shortest = max(2, context_chunks(self._method, **self._spec.knobs))
        longest = self.length - max(self.prompt_lens)
        if longest < shortest:
            raise InputError(
                f"context.physical={self.length} leaves {longest} tokens beside the prompt, a sample needs {shortest}"
            )
        try:
            return Packing(self.length, longest, shortest, tuple(self.prompt_lens), align, self._seed)
        except ValueError as error:
            raise InputError(f"data.align={align}: {error}") from None

    def write(self, row: dict[str, np.ndarray], context: np.ndarray, prompt_number: int, index: int) -> None:
        """A sample as long as its context and its prompt ask, into the arrays of a row.

        `row` holds views of a + b elements of what `build` returns, all zero where nothing is written.
        """
        prompt = self._forms[prompt_number].prompt
        a, b = len(context), len(prompt)
        tokens = row["tokens"]
        tokens[:a] = context
        tokens[a:] = prompt
        row["labels"][:-1] = tokens[1:]
        row["position_ids"][:] = self._positions(a, b, index)
        row["loss_weights"][: a - 1] = 1.0
        if b:
            row["loss_weights"][a - 1 : -1] = self._spec.prompt_loss_weight
            row["prompt_mask"][a - 1 : -1] = True
