"""RULER's questions: length by length, task by task, each made when it is its turn."""

import importlib.metadata
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.benchmark import Sample
from endprompt_megatron.evaluate.suites.ruler.counting import CodedWords, CommonWords
from endprompt_megatron.evaluate.suites.ruler.documents import Documents
from endprompt_megatron.evaluate.suites.ruler.niah import Needles
from endprompt_megatron.evaluate.suites.ruler.ruler_settings import QA_FILES, SEED, RulerSettings
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import ESSAY_TASKS, TASKS
from endprompt_megatron.evaluate.suites.ruler.ruler_words import pairs
from endprompt_megatron.evaluate.suites.ruler.sources import NVIDIAS, named, sources_of
from endprompt_megatron.evaluate.suites.ruler.templates import Template, template
from endprompt_megatron.evaluate.suites.ruler.token_budget import FittedPrompt, TokenBudget
from endprompt_megatron.evaluate.suites.ruler.variable_tracking import Tracing
from endprompt_megatron.tokenizer import Tokenizer

SUITE = "ruler"
_MAKERS = {"niah": Needles, "vt": Tracing, "cwe": CommonWords, "fwe": CodedWords, "qa": Documents}


def check(settings: RulerSettings) -> dict[str, int]:
    """Read every source that is needed, and count the questions of each task that will be asked.

    Says on stderr which tasks are left out.  Raises InputError for a missing or malformed file.
    """
    template(settings.template, settings.model)
    sources_ = sources_of(settings)
    for task, reason in settings.left_out.items():
        print(f"RULER: {task} is left out: {reason}", file=sys.stderr)
    pairs()
    if set(settings.asked) & set(ESSAY_TASKS):
        sources_.sentences(1)
    for task in settings.asked:
        if task in QA_FILES:
            there = len(sources_.questions(QA_FILES[task])[0])
            if there < settings.samples:
                raise InputError(
                    f"--ruler-samples {settings.samples}: above the {there} questions in "
                    f"--{QA_FILES[task]} {getattr(settings, QA_FILES[task])}; use at most {there}"
                )
    return dict.fromkeys(settings.asked, settings.samples * len(settings.lengths))


def sources(settings: RulerSettings) -> dict[str, Any]:
    """What the questions are made from, by name, and the tasks left out with the reason."""
    sources_ = sources_of(settings)
    made_of: dict[str, Any] = {"words": f"wonderwords {importlib.metadata.version('wonderwords')}"}
    if set(settings.asked) & set(ESSAY_TASKS):
        made_of["haystack"] = sources_.haystack_name
        made_of["sentences"] = "NLTK's punkt_tab, english" if settings.punkt is None else str(settings.punkt)
    made_of |= {file: named(getattr(settings, file)) for task, file in QA_FILES.items() if task in settings.asked}
    return {**made_of, "template": settings.template, "seed": settings.seed, "left_out": settings.left_out}


def samples(settings: RulerSettings, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Every question of every asked task and length, lazily; the first N of a task do not depend on `samples`.

    A prompt and its new tokens are at most `length`, BOS not counted, as NVIDIA does not.  Raises InputError.
    """
    form = template(settings.template, settings.model)
    for length, task in itertools.product(settings.lengths, settings.asked):
        prefix = TASKS[task].answer_prefix
        extra = {"haystack": sources_of(settings).haystack_name} if task in ESSAY_TASKS else {}
        for number, fitted in enumerate(prompts(settings, tokenizer, form, task, length)):
            yield Sample(
                suite=SUITE,
                task=task,
                length=length,
                number=number,
                prompt=_with_bos(tokenizer, fitted.ids),
                max_new_tokens=TASKS[task].new_tokens,
                references=fitted.references,
                extra={
                    **extra,
                    "deviations": _deviations(settings, task, fitted),
                    "answer_prefix": fitted.text[fitted.text.rfind(prefix[:10]) :],
                },
            )


def prompts(
    settings: RulerSettings, tokenizer: Tokenizer, form: Template, task: str, length: int
) -> Iterator[FittedPrompt]:
    """The first `settings.samples` prompts of one task and length, each with its text."""
    encode = _encoder(tokenizer, form)
    budget = TokenBudget(task, length, TASKS[task].new_tokens, encode)
    maker = _MAKERS[TASKS[task].kind](TASKS[task], form, budget, settings.seed, sources_of(settings))
    return itertools.islice(maker.prompts(), settings.samples)


def _encoder(tokenizer: Tokenizer, form: Template) -> Callable[[str], list[int]]:
    """In a chat template the names of special tokens stand for these tokens."""
    return tokenizer.encode if form.plain else tokenizer.encode_prompt


def _with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """With BOS where the model family puts it; a chat template that begins with its name has it already."""
    return [tokenizer.bos_id, *ids] if tokenizer.starts_with_bos and ids[:1] != [tokenizer.bos_id] else ids


def _deviations(settings: RulerSettings, task: str, fitted: FittedPrompt) -> list[str]:
    """How a question differs from those of published scores, as far as that can be told."""
    found = []
    if settings.seed != SEED:
        found.append(f"seed {settings.seed} instead of {SEED}")
    if task in ESSAY_TASKS and settings.haystack is None:
        found.append(f"haystack: {sources_of(settings).haystack_name} instead of NVIDIA's PaulGrahamEssays.json")
    if task in ESSAY_TASKS and settings.punkt is not None:
        found.append("sentences by another Punkt model than NLTK's")
    if fitted.long_list and sources_of(settings).words_name != NVIDIAS:
        found.append(f"cwe's long list of words: {sources_of(settings).words_name} instead of {NVIDIAS}")
    return found
