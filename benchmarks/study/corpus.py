"""Text in which retrieval matters: made-up prose between facts that are stated once and queried later.

A document is a row of sentences of three kinds:
  prose      words that follow one another by a fixed chain, so that a small model learns them quickly
  fact       "note KEY VALUE.", a key that this document has not used lately with a value drawn at random
  question   "ask KEY VALUE." for a fact told earlier: the value can be known only from there

Looking a fact up takes two steps of attention: the value must know the key before it, and the question must find that
key.  A drill, pairs of key and value that come again and again, teaches both in short rows.

Distances between what is told and what is asked are log-uniform from the nearest to the longest that is wanted, as
references in real texts are mostly near and sometimes far.  Pure functions of a seed; no torch.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

MARKS = ("note", "ask")  # the words that open a sentence of a kind
_NEAREST = 8  # tokens between a fact and its question


def words(seed: int = 0) -> dict[str, list[str]]:
    """The vocabulary by kind: prose, keys, values; no word is of two kinds."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    pairs = [a + b for a, b in itertools.product(syllables, syllables)]
    random.Random(seed).shuffle(pairs)
    return {"prose": pairs[:40], "keys": pairs[40:136], "values": pairs[136:168]}


def every_word() -> list[str]:
    """All words that are to be one token."""
    return [*itertools.chain(*words().values()), *MARKS]


def chain(prose: list[str], seed: int = 0) -> dict[str, list[str]]:
    """Which words may follow which: six, drawn once."""
    rng = random.Random(seed + 1)
    return {word: rng.sample(prose, 6) for word in prose}


def document(rng: random.Random, length: int, longest: int, facts: float) -> str:
    """About `length` tokens (a word and a full stop are one each).

    `longest`: distance of a question, in tokens; `facts`: their share of the sentences that are no questions.
    """
    vocabulary = words()
    follow = chain(vocabulary["prose"])
    sentences: list[str] = []
    due: list[tuple[int, str, str]] = []  # at which token to ask, what, and its answer
    told: dict[str, int] = {}
    at, word = 0, rng.choice(vocabulary["prose"])

    def say(said: list[str]) -> None:
        nonlocal at
        sentences.append(" ".join(said) + ".")
        at += len(said) + 1

    while at < length:
        due.sort()
        if due and due[0][0] <= at:
            say(["ask", *due.pop(0)[1:]])
        elif rng.random() < facts:
            key = rng.choice(vocabulary["keys"])
            if at - told.get(key, -math.inf) < longest + _NEAREST * 8:
                continue  # its questions may still come
            told[key] = at
            value = rng.choice(vocabulary["values"])
            say(["note", key, value])
            for _ in range(rng.choice((1, 1, 2))):
                distance = math.exp(rng.uniform(math.log(_NEAREST), math.log(longest)))
                due.append((at + round(distance), key, value))
        else:
            said = []
            for _ in range(rng.randint(4, 9)):
                word = rng.choice(follow[word])
                said.append(word)
            say(said)
    return " " + " ".join(sentences)


def drill(rng: random.Random, length: int, keys: int) -> str:
    """About `length` tokens of pairs of key and value; `keys` of them come again and again, now and then a new one."""
    vocabulary = words()
    pairs: dict[str, str] = {}
    said: list[str] = []
    while len(said) < length:
        if len(pairs) < keys or rng.random() < 0.1 / keys:
            if len(pairs) == keys:
                del pairs[rng.choice(list(pairs))]
            pairs[rng.choice(vocabulary["keys"])] = rng.choice(vocabulary["values"])
        key = rng.choice(list(pairs))
        said += [key, pairs[key]]
    return " " + " ".join(said)


def recall_form() -> dict:
    """Facts and questions of this corpus, for the recall suite of tools/evaluate.py."""
    vocabulary = words()
    return {
        "fact": " note {key} {value}.",
        "question": " ask {key}",
        "answer": " {value}",
        "keys": tuple(vocabulary["keys"]),
        "key_words": 1,
        "values": tuple(vocabulary["values"]),
        "value_words": 1,
    }


def documents(count: int, seed: int, write: Callable[..., str], *what: float) -> Iterator[str]:
    """`count` documents of `write`, which is `document` or `drill`, each from its own random numbers."""
    for number in range(count):
        yield write(random.Random(f"{seed}/{number}"), *what)


def write_jsonl(path: Path, texts: Iterator[str]) -> None:
    """One document a line, as tools/prepare_data.py reads it."""
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
