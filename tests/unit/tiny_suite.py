"""A benchmark as RULER and LongBench are, small enough to count by hand."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from endprompt_megatron.evaluate.suites.benchmark import Benchmark, Sample

WORDS = "red green blue black white brown pink grey".split()


@dataclass(frozen=True)
class TinySettings:
    lengths: tuple[int, ...] = (24, 48)
    samples: int = 5
    stop: tuple[str, ...] = ()


def prepare(settings, subject, name="ruler"):
    benchmark = Benchmark(name, partial(samples, settings), score, summary, sources, by_length=True)
    return benchmark.prepare(subject, 2 * settings.samples * len(settings.lengths), 36)


def samples(settings, tokenizer):
    for length in settings.lengths:
        for task in ("first", "second"):
            for number in range(settings.samples):
                rng = np.random.default_rng([length, number, len(task)])
                words = [str(word) for word in rng.choice(WORDS, 3)]
                prompt = tokenizer.encode(" ".join([str(number), *words]))
                prompt = (prompt * length)[: length - 8]
                reference = f"{words[0]} {number}" if task == "first" else words[1]
                yield Sample("tiny", task, length, number, prompt, 8, [reference], settings.stop, {"words": words})


def score(sample, answer):
    assert sample.extra["words"]
    return float(sample.references[0] in answer)


def summary(scored):
    by_task = {}
    for sample, answer, value in scored:
        assert isinstance(answer, str)
        by_task.setdefault(sample.task, []).append(value)
    return {"tasks": {task: {"score": 100 * np.mean(v), "questions": len(v)} for task, v in by_task.items()}}


def sources():
    return {"words": "eight colours"}
