"""The inputs of the recall suite: facts in held-out text, and where they are asked for.

A form says what facts and questions look like; a JSON file replaces it for a model that knows only one kind of text.
Distances are from the first token of the value in the fact to its first token in the answer.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.evaluate.engines.base import Branch, Engine, branch_losses
from endprompt_megatron.evaluate.requests import Request, content_of
from endprompt_megatron.evaluate.suites.needle import continuation
from endprompt_megatron.evaluate.suites.perplexity import block_means
from endprompt_megatron.tokenizer import Tokenizer

AT_ONCE = 16384  # tokens of one forward pass
TOGETHER = "together"  # the task of a request that asks all facts of an input
_TRIES = 1000  # keys drawn until one is not in the text
_WORDS = (
    "Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliet Kilo Lima Mike November Oscar Papa Quebec Romeo "
    "Sierra Tango Uniform Victor Whiskey Yankee Zulu"
).split()


@dataclass(frozen=True)
class Form:
    """Texts of a fact, which contains the answer, of a question, and of the answer that goes on from it."""

    fact: str = "\nThe code of {key} is {value}.\n"
    question: str = "\nThe code of {key} is"
    answer: str = " {value}"
    keys: tuple[str, ...] = tuple(_WORDS)
    key_words: int = 2
    values: tuple[str, ...] = tuple("0123456789")
    value_words: int = 5


def read_form(path: Path | str | None) -> Form:
    """The form of a JSON file with some of Form's fields; the usual one without.  Raises InputError."""
    if path is None:
        return Form()
    given = read_json(Path(path), "the form of facts and questions")
    unknown = set(given) - set(asdict(Form()))
    if unknown:
        raise InputError(
            f"--recall-form {path}: unknown {', '.join(sorted(unknown))}; it has {', '.join(asdict(Form()))}"
        )
    for name, value in given.items():
        usual = getattr(Form(), name)
        if isinstance(usual, tuple):
            if not isinstance(value, list) or not value or not all(isinstance(w, str) for w in value):
                raise InputError(f"--recall-form {path}: {name} should be a list of words")
            given[name] = tuple(value)
        elif type(value) is not type(usual) or (isinstance(value, int) and value < 1):
            what = "a text" if isinstance(usual, str) else "a number, at least 1"
            raise InputError(f"--recall-form {path}: {name}={value!r} should be {what}")
    form = Form(**given)
    if form.key_words > len(form.keys):
        raise InputError(
            f"--recall-form {path}: key_words={form.key_words}, but keys has {len(form.keys)} words; give more"
        )
    for name in ("fact", "question", "answer"):
        try:
            getattr(form, name).format(key="", value="")
        except (KeyError, IndexError, ValueError):
            raise InputError(
                f"--recall-form {path}: {name}={getattr(form, name)!r} should have no braces but {{key}} and {{value}}"
            ) from None
    for name, needs in (("fact", "{key}"), ("fact", form.answer.strip()), ("question", "{key}"), ("answer", "{value}")):
        if needs not in getattr(form, name):
            raise InputError(f"--recall-form {path}: {name}={getattr(form, name)!r} should have {needs} in it")
    return form


def default_distances(length: int) -> list[int]:
    """Powers of two from 64 up to half of the length, and three quarters and seven eighths of it."""
    powers = [2**exponent for exponent in range(6, 64) if 2**exponent <= length // 2]
    return [*powers, length * 3 // 4, length * 7 // 8]


def distances_of(length: int, distances: list[int] | None) -> list[int]:
    """The distances that are asked in inputs of that length: those of `distances` below it, or the usual ones."""
    return [each for each in distances if each < length] if distances else default_distances(length)


def expected(lengths: list[int], distances: list[int] | None, samples: int, together: bool) -> tuple[int, int]:
    """How many requests, and about how many tokens in all."""
    if together:
        return samples, samples * lengths[-1]
    cells = {length: len(distances_of(length, distances)) for length in lengths}
    requests = sum(count * -(-samples // max(1, AT_ONCE // length)) for length, count in cells.items())
    return requests, sum(count * samples * length for length, count in cells.items())


def recall_requests(
    tokenizer: Tokenizer,
    text: np.ndarray,
    lengths: list[int],
    form: Form,
    *,
    distances: list[int] | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Iterator[Request]:
    """`samples` inputs of every length and distance below it, several to a request.  `text` int64 [n]: held-out text.

    The same seed asks the same.  Raises InputError for a length that is longer than the text, or too short.
    """
    for length in lengths:
        for distance in distances_of(length, distances):
            rows, scored = [], []
            for sample in range(samples):
                # Keyed by place, not drawn in order: a cell stays the same when the grid changes.
                rng = np.random.default_rng([seed, length, distance, sample])
                row, answer = build_row(tokenizer, text, length, distance, form, rng)
                rows.append(row)
                scored.append(answer)
            size = max(1, AT_ONCE // length)
            for number, start in enumerate(range(0, samples, size)):
                tokens, answers = np.stack(rows[start : start + size]), scored[start : start + size]

                def ask(engine: Engine, tokens: np.ndarray = tokens, answers: list[int] = answers) -> dict:
                    losses, right = engine.token_losses(tokens, last=max(answers))
                    scores = [_scores(*both, n) for *both, n in zip(losses, right, answers, strict=True)]
                    return {name: [score[name] for score in scores] for name in scores[0]}

                name = ("recall", f"{distance}", length, number)
                yield Request(*name, content_of(tokens, answers), tokens.size, ask=ask)


def requests_together(
    tokenizer: Tokenizer,
    text: np.ndarray,
    lengths: list[int],
    form: Form,
    *,
    distances: list[int] | None = None,
    samples: int = 1,
    seed: int = 0,
    passage: int | None = None,
) -> Iterator[Request]:
    """The same lengths and distances in one input a sample: every fact stands in it, and each length is a part of it.

    An engine that goes on from a place in a text reads it once.  The other facts make it a harder question.
    `passage`: each length also ends with the text's own last tokens, of which so many are scored.
    """
    for sample in range(samples):
        rng = np.random.default_rng([seed, sample])
        row, branches, asked = build_together(tokenizer, text, lengths, distances, form, rng, passage)
        last = lengths if passage else []

        def ask(
            engine: Engine, row: np.ndarray = row, branches: list = branches, asked: list = asked, last: list = last
        ) -> dict:
            found = branch_losses(engine, row, branches)
            names = [{"length": length, "distance": distance} for length, distance in asked]
            scores = [_scores(*both, len(both[0])) for both in found[: len(asked)]]
            record: dict = {"facts": [name | score for name, score in zip(names, scores, strict=True)]}
            if last:
                losses = [losses for losses, _ in found[len(asked) :]]
                record["passage"] = [
                    {"length": length, "blocks": block_means(each)} for length, each in zip(last, losses, strict=True)
                ]
            return record

        tokens = len(row) + sum(len(branch.ids) for branch in branches)
        yield Request("recall", TOGETHER, lengths[-1], sample, content_of(row, branches, asked), tokens, ask=ask)


def _scores(losses: np.ndarray, right: np.ndarray, count: int) -> dict[str, float | bool]:
    """Of the last `count` tokens, which are an answer."""
    return {"recalled": bool(right[-count:].all()), "loss": float(losses[-count:].mean())}


@dataclass(frozen=True)
class Fact:
    """A fact and its question, as token ids; the fact's value begins after `lead` tokens, and is the answer."""

    ids: list[int]
    lead: int
    question: list[int]
    answer: list[int]


def draw_fact(tokenizer: Tokenizer, form: Form, around: str, length: int, rng: np.random.Generator) -> Fact:
    """A fact whose key is not in the text around it.  Raises InputError if all keys are."""
    value = " ".join(rng.choice(form.values, form.value_words))
    for _ in range(_TRIES):
        key = " ".join(rng.choice(form.keys, form.key_words, replace=False))
        if key not in around:
            break
    else:
        raise InputError(f"--recall-form: all keys are in {length} tokens of the text already; give more keys")
    before = form.fact.split(form.answer.strip())[0].format(key=key).rstrip()
    question = form.question.format(key=key)
    return Fact(
        tokenizer.encode(form.fact.format(key=key, value=value)),
        len(tokenizer.encode(before)),
        tokenizer.encode(question),
        continuation(tokenizer, question, form.answer.format(key=key, value=value)),
    )


def draw_text(tokenizer: Tokenizer, text: np.ndarray, length: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Some `length` tokens of the text, and what they say.  Raises InputError for a length above the text's."""
    if len(text) < length:
        raise InputError(f"--lengths {length}: the held-out text has only {len(text)} tokens; give a longer --text")
    start = int(rng.integers(0, len(text) - length + 1))
    return text[start : start + length], tokenizer.decode(text[start : start + length].tolist())


def build_row(
    tokenizer: Tokenizer, text: np.ndarray, length: int, distance: int, form: Form, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Text with a fact, the question and its answer: int64 [length], and how many tokens the answer has.

    The answer's first token stands `distance` behind the value's first token in the fact.  Raises InputError.
    """
    hay, around = draw_text(tokenizer, text, length, rng)
    fact = draw_fact(tokenizer, form, around, length, rng)
    room = length - len(fact.ids) - len(fact.question) - len(fact.answer)
    place = length - len(fact.answer) - distance - fact.lead
    if room < 0 or not 0 <= place <= room:
        nearest = len(fact.ids) - fact.lead + len(fact.question)
        raise InputError(
            f"--recall-distances {distance}: in {length} tokens a fact stands {nearest} to "
            f"{length - len(fact.answer) - fact.lead} tokens before its answer; use a distance between them"
        )
    row = np.concatenate([hay[:place], fact.ids, hay[place:room], fact.question, fact.answer]).astype(np.int64)
    return row, len(fact.answer)


def build_together(
    tokenizer: Tokenizer,
    text: np.ndarray,
    lengths: list[int],
    distances: list[int] | None,
    form: Form,
    rng: np.random.Generator,
    passage: int | None = None,
) -> tuple[np.ndarray, list[Branch], list[tuple[int, int]]]:
    """Text with the facts of all lengths and distances, a branch for each question, and its length and distance.

    A branch with the text before it is `length` tokens; distances are exact.  A fact that stands as far from the end
    of two lengths as either asks is one fact, asked twice.  With `passage`, a branch for each length follows that goes
    on with the same tokens, the last of the text: as many before those that are scored, so that they do not begin in
    another text.  Raises InputError for facts that do not fit side by side.
    """
    longest, held = lengths[-1], 2 * (passage or 0)
    if lengths[0] <= held:
        raise InputError(f"--recall-passage {passage}: --lengths {lengths[0]} should be above {held}, twice as many")
    hay, around = draw_text(tokenizer, text[: len(text) - held], longest, rng)
    asked = [(length, distance) for length in lengths for distance in distances_of(length, distances)]
    facts: dict[int, Fact] = {}  # by the place where the answer would end if it stood where the value does
    for place in sorted({length - distance for length, distance in asked}):
        facts[place] = fact = draw_fact(tokenizer, form, around, longest, rng)
        around += tokenizer.decode(fact.ids)  # the next one has another key
    row: list[int] = []
    used, begins = 0, {}
    for place, fact in facts.items():
        begins[place] = place - len(fact.answer) - fact.lead
        gap = begins[place] - len(row)
        if gap < 0:
            raise InputError(
                f"--recall-distances: the fact {longest - place} tokens before the end of {longest} begins "
                f"{-gap} tokens before another one ends; use distances further apart"
            )
        row += [*hay[used : used + gap].tolist(), *fact.ids]
        used += gap
    row += hay[used : used + longest - len(row)].tolist()
    branches = []
    for length, distance in asked:
        fact = facts[length - distance]
        branch = Branch(
            length - len(fact.question) - len(fact.answer), [*fact.question, *fact.answer], len(fact.answer)
        )
        for place, other in facts.items():
            if begins[place] < branch.after < begins[place] + len(other.ids):
                raise InputError(
                    f"--recall-distances {distance}: in {length} tokens the question comes in the middle of the fact "
                    f"{longest - place} tokens before the end of {longest}; use other distances"
                )
        branches.append(branch)
    for length in lengths if passage else []:
        # Before a fact that it would cut.
        cut = [begin for place, begin in begins.items() if begin < length - held < begin + len(facts[place].ids)]
        branches.append(Branch(min([length - held, *cut]), text[-held:].tolist(), passage))
    return np.asarray(row, dtype=np.int64), branches, asked


def form_as_json(form: Form) -> str:
    """What `read_form` reads."""
    return json.dumps(asdict(form), indent=1) + "\n"
