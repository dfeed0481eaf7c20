"""Asking a double, for the tests of what is asked, stored and put together."""

import json

from unit import doubles, tiny_suite

from endprompt_megatron.evaluate.evaluation import evaluate
from endprompt_megatron.evaluate.preparation import Model
from endprompt_megatron.evaluate.registry import Settings
from endprompt_megatron.evaluate.split import Alone, Part
from endprompt_megatron.tokenizer import load_tokenizer


def ask(model_dir, out, model, *, part=None, merge=False, **options):
    settings = Settings(**{"suites": ["ruler"], "lengths": [24, 48], "dtype": "float32"} | options)
    models = {"extended": Model(model_dir, model_dir)}
    return evaluate(settings, models, out, lambda _: model, ranks=Alone(part or Part()), merge=merge)


def questions(settings, model_dir):
    return list(tiny_suite.samples(settings, load_tokenizer(model_dir)))


def knowing(model_dir, settings, answer, kind=doubles.Knowing):
    return kind(questions(settings, model_dir), load_tokenizer(model_dir), answer)


def right(question):
    return question.references[0]


def stable(results):
    """What two runs of the same have in common: all but clocks."""
    plain = json.loads(json.dumps(results))
    for measured in plain["measurements"].values():
        measured.pop("seconds")
    return {key: plain[key] for key in ("measurements", "scores", "settings", "text", "comparisons") if key in plain}
