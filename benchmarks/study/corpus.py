"""Text in which retrieval matters: made-up prose between facts that are told once and asked for later.

A document is a row of sentences of three kinds:
  prose      words that follow one another by a fixed chain, so that a small model learns them quickly
  fact       "note STEMending.", a stem that this document has not used lately with an ending drawn at random
  question   "ask STEM STEMending." for a fact told earlier: the ending can be known only from there

A stem with its ending is one token, so that looking a fact up takes one step of attention instead of two (find the
stem, read what follows it), which is meant to keep the first lesson short.

Distances between what is told and what is asked are log-uniform from the nearest to the longest that is wanted, as
references in real texts are mostly near and sometimes far.  Pure functions of a seed; no torch.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

MARKS = ("note", "ask")  # the words that open a sentence of a kind
_NEAREST = 8  # tokens between a fact and its question


def words(seed: int = 0) -> dict[str, list[str]]:
    """The vocabulary by kind: prose, stems, endings; no word of prose is a stem."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    pairs = [a + b for a, b in itertools.product(syllables, syllables)]
    random.Random(seed).shuffle(pairs)
    return {"prose": pairs[:40], "stems": pairs[40:136], "endings": ["x", "ch", "sh", "ss", "th", "nk"]}


def every_word() -> list[str]:
    """All words that are to be one token."""
    vocabulary = words()
    inflected = [stem + ending for stem in vocabulary["stems"] for ending in vocabulary["endings"]]
    return [*vocabulary["prose"], *vocabulary["stems"], *inflected, *MARKS]


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
    due: list[tuple[int, str]] = []  # at which token a sentence is to come
    told: dict[str, int] = {}
    at, word = 0, rng.choice(vocabulary["prose"])

    def say(said: list[str]) -> None:
        nonlocal at
        sentences.append(" ".join(said) + ".")
        at += len(said) + 1

    while at < length:
        due.sort()
        if due and due[0][0] <= at:
            stem, inflected = due.pop(0)[1].split()
            say(["ask", stem, inflected])
        elif rng.random() < facts:
            stem = rng.choice(vocabulary["stems"])
            if at - told.get(stem, -math.inf) < longest + _NEAREST * 8:
                continue  # its questions may still come
            told[stem] = at
            inflected = stem + rng.choice(vocabulary["endings"])
            say(["note", inflected])
            for _ in range(rng.choice((1, 1, 2))):
                distance = math.exp(rng.uniform(math.log(_NEAREST), math.log(longest)))
                due.append((at + round(distance), f"{stem} {inflected}"))
        else:
            said = []
            for _ in range(rng.randint(4, 9)):
                word = rng.choice(follow[word])
                said.append(word)
            say(said)
    return " " + " ".join(sentences)


def recall_form() -> dict:
    """Facts and questions of this corpus, for the recall suite of tools/evaluate.py."""
    vocabulary = words()
    return {
        "fact": " note {key}{value}.",
        "question": " ask {key}",
        "answer": " {key}{value}",
        "keys": tuple(vocabulary["stems"]),
        "key_words": 1,
        "values": tuple(vocabulary["endings"]),
        "value_words": 1,
    }


def documents(count: int, seed: int, length: int, longest: int, facts: float) -> Iterator[str]:
    """`count` documents, each from its own random numbers."""
    for number in range(count):
        yield document(random.Random(f"{seed}/{number}"), length, longest, facts)


def write_jsonl(path: Path, texts: Iterator[str]) -> None:
    """One document a line, as tools/prepare_data.py reads it."""
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
