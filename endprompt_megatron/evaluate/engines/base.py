"""The protocol that every suite is written against, and what the engines behind it share.

transformers_engine.py is the default; vllm_engine.py needs vLLM, megatron_engine.py Megatron-Core.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json

DTYPES = ("bfloat16", "float16", "float32")
ENGINES = ("transformers", "vllm", "megatron")
Ended = Callable[[list[int]], bool]  # whether an answer is complete, asked after each of its tokens


@dataclass(frozen=True)
class Prompt:
    """The arguments of `generate`, for engines that take many prompts at once."""

    ids: list[int]
    max_new_tokens: int
    ended: Ended | None = None


@dataclass(frozen=True)
class Branch:
    """What goes on from the first `after` tokens of a text.  The last `scored` ids are scored; the first never is."""

    after: int
    ids: list[int]
    scored: int


class Answer:
    """A greedy continuation beside the expected one."""

    def __init__(self, generated: list[int], logprobs: np.ndarray, ranks: np.ndarray) -> None:
        self.generated = generated  # token ids
        self.logprobs = logprobs  # float32 [len(expected)], nats, each given the true tokens before it
        self.ranks = ranks  # int64 [len(expected)], 0 where the true token was the most likely one


class Engine(Protocol):
    """What a suite needs of a model.  Token ids and positions are int64 arrays."""

    def token_losses(
        self, tokens: np.ndarray, position_ids: np.ndarray | None = None, *, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cross entropy in nats of each token given those before it, and whether greedy decoding would choose it.

        tokens [b, s]; position_ids [b, s], by default 0..s-1.  Returns float32 and bool, both [b, s-1]; with
        `last` only the last `last` columns, which is cheaper.
        """
        ...

    def generate(self, prompt_ids: list[int], max_new_tokens: int, ended: Ended | None = None) -> list[int]:
        """Greedy continuation, without the prompt, ended by an end-of-text token (which is not returned).

        An engine may go on after `ended`: the caller cuts the answer there.
        """
        ...

    def answer(self, prompt_ids: list[int], expected: list[int], max_new_tokens: int) -> Answer:
        """`generate`, and how likely the expected continuation was."""
        ...

    def describe(self) -> dict:
        """What was measured, for results.json."""
        ...


def generate_all(engine: Engine, prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, list[int]]]:
    """Every prompt with its continuation, as they are finished.

    An engine that reads several prompts together has its own `generate_all`, which takes more as it has room.
    """
    own = getattr(engine, "generate_all", None)
    if own is not None:
        yield from own(prompts)
        return
    for prompt in prompts:
        yield prompt, engine.generate(prompt.ids, prompt.max_new_tokens, prompt.ended)


def branch_losses(engine: Engine, text: np.ndarray, branches: list[Branch]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`token_losses` of each branch's scored tokens, float32 and bool [scored], in the order given.

    `text` int64 [s], of which a branch sees the first `after` tokens alone.  An engine that can go on from a place in
    a text has its own `branch_losses`, which reads the text once.
    """
    own = getattr(engine, "branch_losses", None)
    if own is not None:
        return own(text, branches)
    return [branch_alone(engine, text, branch) for branch in branches]


def branch_alone(engine: Engine, text: np.ndarray, branch: Branch) -> tuple[np.ndarray, np.ndarray]:
    """The same of one branch, by reading all that it sees."""
    tokens = np.concatenate([text[: branch.after], np.asarray(branch.ids, dtype=np.int64)])
    losses, right = engine.token_losses(tokens[None], last=branch.scored)
    return losses[0], right[0]


def checked_engine(name: str) -> str:
    """The name.  Raises InputError for an engine that is unknown or not installed."""
    if name not in ENGINES:
        raise InputError(f"--engine {name}: unknown; use one of {', '.join(ENGINES)}")
    package = {"vllm": "vllm", "megatron": "megatron.core", "transformers": "transformers"}[name]
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent package
        found = False
    if not found:
        remedy = "pip install vllm, or use --engine transformers" if name == "vllm" else "see requirements.txt"
        raise InputError(f"--engine {name}: {package} is not installed here; {remedy}")
    return name


def checked_dtype(dtype: str) -> str:
    """The name.  Raises InputError for a dtype that models are not read in."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: unknown; use one of {', '.join(DTYPES)}")
    return dtype


def checked_tokens(tokens: np.ndarray, vocab_size: int, where: Path | str) -> np.ndarray:
    """Tokens as int64 [b, s].  Raises InputError for an id the model does not have."""
    tokens = np.asarray(tokens, dtype=np.int64)
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens should be [batch, sequence], got shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens.max() if tokens.min() >= 0 else tokens.min()
        raise InputError(
            f"{where}: token id {wrong} is outside its vocabulary of {vocab_size}; "
            "the text must be tokenised with this model's tokenizer"
        )
    return tokens


def end_ids(directory: Path) -> set[int]:
    """Tokens that end an answer, as transformers reads them from a Hugging Face directory."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ends = read_json(directory / name, "a config").get("eos_token_id")
            return set(ends if isinstance(ends, list) else [ends]) - {None}
    return set()
