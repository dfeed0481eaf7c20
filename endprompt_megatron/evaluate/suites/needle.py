"""Passkey retrieval at real input lengths: five digits hidden in long filler, asked for at the end.

Each cell of the grid (length x depth) holds several prompts.  Two scores:
  accuracy  the first run of digits in the greedy answer is the key, to the last digit;
  recall    every token of the key is the most likely one given the true tokens before it.  A small model that
            answers in a roundabout way ("is the pass key ...") still shows here whether it reads the key.
The mean log probability of the key's tokens tells degrees apart where both are 0 or 1.
"""

import itertools
import re
from collections.abc import Iterator

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.base import Engine
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.requests import Answered, Entry, Item, content_of
from endprompt_megatron.tokenizer import Tokenizer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DEPTHS = (0.1, 0.5, 0.9)
ANSWER_TOKENS = 12  # room for a space, five digits and a few words around them


def items(
    tokenizer: Tokenizer,
    lengths: list[int],
    *,
    depths: list[float] = list(DEPTHS),  # noqa: B006  (never changed)
    samples: int = 1,
    seed: int = 0,
    filler: np.ndarray | None = None,
) -> Iterator[Item]:
    """`samples` prompts a cell.  `filler` int64 [n]: held-out text; None: repeated noise.

    Prompt and answer together are `length` tokens; the same seed asks the same.  Raises InputError for a length that
    is too short, or longer than the filler.
    """
    for length, depth, sample in itertools.product(lengths, depths, range(samples)):
        # Keyed by place, not drawn in order: a cell stays the same when the grid changes.
        rng = np.random.default_rng([seed, length, round(depth * 10000), sample])
        key = str(rng.integers(10000, 100000))
        prompt = build_prompt(tokenizer, key, length - ANSWER_TOKENS, depth, filler, rng)
        expected = expected_answer(tokenizer, key)

        def ask(engine: Engine, key: str = key, prompt: list[int] = prompt, expected: list[int] = expected) -> dict:
            return _ask(engine, tokenizer, key, prompt, expected)

        notes = {"depth": depth, "filler": "noise" if filler is None else "text"}
        entry = Entry("needle", f"{depth:g}", length, sample, notes)
        yield Item(entry, content_of(prompt, expected, ANSWER_TOKENS), length, ask)


def result(pairs: list[Answered]) -> dict:
    """{"filler", "cells": [{length, depth, samples, accuracy, recall, logprob, answers: [{key, answer, correct,
    recalled, logprob, ranks}]}]}."""
    cells: dict[tuple[int, float], list[dict]] = {}
    for entry, record in pairs:
        cells.setdefault((entry.length, entry.notes["depth"]), []).append(record)
    return {
        "filler": pairs[0][0].notes["filler"],
        "cells": [
            {
                "length": length,
                "depth": depth,
                "samples": len(answers),
                "accuracy": float(np.mean([answer["correct"] for answer in answers])),
                "recall": float(np.mean([answer["recalled"] for answer in answers])),
                "logprob": float(np.mean([answer["logprob"] for answer in answers])),
                "answers": answers,
            }
            for (length, depth), answers in cells.items()
        ],
    }


def series(pairs: list[Answered]) -> list[Series]:
    """Accuracy and recall of every cell, and of every length over its depths."""
    values: dict[tuple[str, int, str], list[float]] = {}
    for entry, record in pairs:
        for metric, value in (("accuracy", record["correct"]), ("recall", record["recalled"])):
            for task in (f"depth {entry.task}", "all depths"):
                values.setdefault((task, entry.length, metric), []).append(float(value))
    return [
        Series("needle", task, length, metric, (np.asarray(found),)) for (task, length, metric), found in values.items()
    ]


def _ask(engine: Engine, tokenizer: Tokenizer, key: str, prompt: list[int], expected: list[int]) -> dict:
    answer = engine.answer(prompt, expected, ANSWER_TOKENS)
    text = tokenizer.decode(answer.generated)
    found = re.search(r"\d+", text)
    # A separate token for the space before the key is manners, not memory.
    of_key = [place for place, token in enumerate(expected) if any(c.isdigit() for c in tokenizer.decode([token]))]
    return {
        "key": key,
        "answer": text,
        "correct": bool(found and found.group() == key),
        "recalled": bool((answer.ranks[of_key] == 0).all()),
        "logprob": float(answer.logprobs[of_key].mean()),
        "ranks": [int(rank) for rank in answer.ranks[of_key]],
    }


def expected_answer(tokenizer: Tokenizer, key: str) -> list[int]:
    """The ids that follow QUESTION in the right answer."""
    return continuation(tokenizer, QUESTION, f" {key}")


def continuation(tokenizer: Tokenizer, before: str, after: str) -> list[int]:
    """The ids of `after` where it goes on from `before`."""
    asked = tokenizer.encode(before)
    answered = tokenizer.encode(before + after)
    # Tokenised together, because SentencePiece marks a word's start differently at the start of a text.
    return answered[len(asked) :] if answered[: len(asked)] == asked else tokenizer.encode(after)


def build_prompt(
    tokenizer: Tokenizer,
    key: str,
    length: int,
    depth: float,
    filler: np.ndarray | None,
    rng: np.random.Generator,
) -> list[int]:
    """Task, filler with the key's sentence at `depth` of it, question: exactly `length` ids.  Raises InputError."""
    task, hidden = tokenizer.encode(TASK), tokenizer.encode(NEEDLE.format(key=key))
    question = tokenizer.encode(QUESTION)
    room = length - len(task) - len(hidden) - len(question)
    if room < 1:
        least = length - room + ANSWER_TOKENS + 1
        raise InputError(f"--lengths {length + ANSWER_TOKENS}: too short for a passkey prompt; use {least} or more")
    if filler is None:
        unit = np.asarray(tokenizer.encode(NOISE), dtype=np.int64)
        start, stream = 0, np.tile(unit, room // len(unit) + 1)
        place = round(room * depth / len(unit)) * len(unit)  # between two rounds of the noise, not inside a word
    else:
        if len(filler) < room:
            raise InputError(f"--lengths {length + ANSWER_TOKENS}: the held-out text has {len(filler)} tokens only")
        start, stream = int(rng.integers(0, len(filler) - room + 1)), filler
        place = round(room * depth)
    hay = stream[start : start + room].tolist()
    place = min(place, room)
    return task + hay[:place] + hidden + hay[place:] + question
