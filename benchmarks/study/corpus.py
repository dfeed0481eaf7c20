"""Text in which retrieval matters: made-up prose between facts that are told once and asked for later.

A document is a row of sentences of four kinds:
  prose      words that follow one another by a fixed chain, so that a small model learns them quickly
  fact       "note KEY V V." with a key that this document has not used lately and values drawn at random
  question   "ask KEY V V." for a fact told earlier; only who finds the fact can tell the values
  quotation  "quote W .. W." and later "again W .. W.", the same words

Distances between what is told and what is asked are log-uniform from the nearest to the longest that is wanted, as
references in real texts are mostly near and sometimes far.  Pure functions of a seed; no torch.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

VALUES = 2  # words of a value
MARKS = ("note", "ask", "quote", "again")  # the words that open a sentence of each kind
SPAN = 10  # words of a quotation
_FORGET = 2304  # tokens after which a key may be told anew: above the study's target


def words(seed: int = 0) -> dict[str, list[str]]:
    """The vocabulary by kind: prose, keys, values; no word is in two of them."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    pairs = [a + b for a, b in itertools.product(syllables, syllables)]
    random.Random(seed).shuffle(pairs)
    return {"prose": pairs[:40], "keys": pairs[40:136], "values": pairs[136:160]}


def chain(prose: list[str], seed: int = 0) -> dict[str, list[str]]:
    """Which words may follow which: six, drawn once."""
    rng = random.Random(seed + 1)
    return {word: rng.sample(prose, 6) for word in prose}


def document(rng: random.Random, vocabulary: dict[str, list[str]], length: int, nearest: int, longest: int) -> str:
    """About `length` tokens (a word and a full stop are one each), distances from `nearest` to `longest` tokens."""
    follow = chain(vocabulary["prose"])
    sentences: list[str] = []
    due: list[tuple[int, str]] = []  # at which token a sentence is to come
    told: dict[str, int] = {}
    at, word = 0, rng.choice(vocabulary["prose"])

    def say(text: str, count: int) -> None:
        nonlocal at
        sentences.append(text + ".")
        at += count + 1

    def later() -> int:
        return at + round(math.exp(rng.uniform(math.log(nearest), math.log(longest))))

    while at < length:
        due.sort()
        if due and due[0][0] <= at + VALUES + 2:
            _, text = due.pop(0)
            say(text, text.count(" ") + 1)
            continue
        kind = rng.random()
        if kind < 0.3:
            key = rng.choice(vocabulary["keys"])
            if told.get(key, -_FORGET) > at - _FORGET:
                continue
            told[key] = at
            value = " ".join(rng.choice(vocabulary["values"]) for _ in range(VALUES))
            say(f"note {key} {value}", VALUES + 2)
            for _ in range(rng.choice((1, 1, 2))):
                due.append((later(), f"ask {key} {value}"))
        elif kind < 0.4:
            span = " ".join(rng.choice(vocabulary["prose"]) for _ in range(SPAN))
            say(f"quote {span}", SPAN + 1)
            due.append((later(), f"again {span}"))
        else:
            said = []
            for _ in range(rng.randint(4, 9)):
                word = rng.choice(follow[word])
                said.append(word)
            say(" ".join(said), len(said))
    return " " + " ".join(sentences)


def drill(rng: random.Random, vocabulary: dict[str, list[str]], length: int, shortest: int, longest: int) -> str:
    """`length` tokens of rows of random words, each said two to four times in a row: nothing but copying.

    No full stops: with a token that frequent in them, a small model takes many times as long to find copying.
    """
    every = [word for kind in vocabulary.values() for word in kind]
    said: list[str] = []
    while len(said) < length:
        said += [rng.choice(every) for _ in range(rng.randint(shortest, longest))] * rng.randint(2, 4)
    return " " + " ".join(said[:length])


def recall_form() -> dict:
    """Facts and questions of this corpus, for the recall suite of tools/evaluate.py."""
    vocabulary = words()
    return {
        "fact": " note {key} {value}.",
        "question": " ask {key}",
        "keys": tuple(vocabulary["keys"]),
        "key_words": 1,
        "values": tuple(vocabulary["values"]),
        "value_words": VALUES,
    }


def documents(make: Callable[..., str], count: int, seed: int, *bounds: int) -> Iterator[str]:
    """`count` texts of `document` or `drill`, each from its own random numbers; `bounds` are their last arguments."""
    vocabulary = words()
    for number in range(count):
        yield make(random.Random(f"{seed}/{number}"), vocabulary, *bounds)


def write_jsonl(path: Path, texts: Iterator[str]) -> None:
    """One document a line, as tools/prepare_data.py reads it."""
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
