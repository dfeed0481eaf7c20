"""A suite from outside the package: how often a model repeats a word that it was given three times."""

import numpy as np

from endprompt_megatron.common.errors import Unavailable
from endprompt_megatron.evaluate.engines.base import Prompt
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.registry import Drawing, Headline, Metric, Option, Prepared, Published, Suite
from endprompt_megatron.evaluate.requests import Request, content_of
from endprompt_megatron.evaluate.tables import quoted_bounds, scores_by_task


def _prepare(subject):
    words, tokenizer = subject.settings.toy_words, subject.tokenizer
    if words > 26:
        raise Unavailable(f"--toy-words {words}: the alphabet ends at 26")

    def requests():
        for number in range(words):
            word = chr(ord("a") + number)
            ids = tokenizer.encode(f"{word} {word} {word}")
            yield Request(
                *("toy", "echo", 0, number),
                content=content_of(np.asarray(ids)),
                notes={"word": word},
                tokens=len(ids),
                prompt=Prompt(ids, 4),
                read=lambda generated: {"text": tokenizer.decode(generated)},
            )

    return Prepared(requests, _result, _series, expected=(words, 5 * words))


def _right(responses):
    return np.asarray([float(response.notes["word"] in response.record["text"]) for response in responses])


def _result(responses):
    return {"repeated": float(_right(responses).mean())}


def _series(responses):
    return [Series("toy", "echo", 0, "repeated", (_right(responses),))]


def _draw(axes, results, palette):
    for place, (label, measured) in enumerate(results["measurements"].items()):
        axes.bar([place], [measured["toy"]["repeated"]], color=palette.of(label))


def _headlines(measured, scores):
    key = ("toy", "echo", 0, "repeated")
    return [Headline("Words repeated", key, f"{measured['repeated']:.0%}", quoted_bounds(scores.get(key), 0, "%"))]


TOY = Suite(
    name="toy",
    title="Echo",
    about="repeats a word that it was given three times",
    options=(Option("toy_words", "words to ask for", int, default=4, minimum=1, metavar="N"),),
    prepare=_prepare,
    inputs_from=("toy_words",),
    metrics=(Metric("repeated"),),
    by_length=False,
    quoted_tasks=("echo",),
    headlines=_headlines,
    tables=lambda results, labels: scores_by_task("Echo", "toy", results, labels),
    drawings=lambda results: [Drawing("Words repeated", _draw)],
    published=lambda settings: Published("task", {"a parrot": {("echo", 0): 100.0}}, {"echo": ("echo", 0)}, "folklore"),
    explanation=lambda measured: "A word stands three times, and the model goes on.",
    unknown_without="whether the model repeats what it hears",
)
