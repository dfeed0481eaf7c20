"""RULER in the table of suites (evaluate/registry.py)."""

import functools
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.options import TEMPLATE, Option, parse_names
from endprompt_megatron.evaluate.published_rows import model, note_on, published
from endprompt_megatron.evaluate.suite import Headline, Prepared, Published, Scores, Subject, Suite
from endprompt_megatron.evaluate.suites.benchmark import Benchmark
from endprompt_megatron.evaluate.suites.ruler.ruler_scores import NOT_COMPARABLE, score, summary
from endprompt_megatron.evaluate.suites.ruler.ruler_settings import SAMPLES, SEED, RulerSettings
from endprompt_megatron.evaluate.suites.ruler.ruler_suite import check, samples, sources
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import TASKS
from endprompt_megatron.evaluate.suites.ruler.templates import NAMED
from endprompt_megatron.evaluate.tables import quoted_bounds, scores_by_task

_FILES = ("haystack", "squad", "hotpotqa", "english_words", "punkt")
_PUBLISHED_LENGTHS = (4096, 8192, 16384, 32768, 65536)


def settings_for(subject: Subject) -> RulerSettings:
    """RULER's own settings from those of the evaluation."""
    s = subject.settings
    return RulerSettings(
        lengths=tuple(s.lengths),
        tasks=tuple(s.ruler_tasks or TASKS),
        samples=s.ruler_samples,
        seed=s.ruler_seed,
        template=s.ruler_template or s.template,
        model=subject.model.config,
        **{name: Path(getattr(s, name)) for name in _FILES if getattr(s, name) is not None},
    )


def _prepare(subject: Subject) -> Prepared:
    settings = settings_for(subject)
    try:
        count = sum(check(settings).values())
    except ModuleNotFoundError as error:
        raise InputError(f"--suite ruler: needs {error.name}, which is not installed") from None
    benchmark = Benchmark(
        name="ruler",
        samples=functools.partial(samples, settings),
        score=score,
        summary=summary,
        sources=functools.partial(sources, settings),
        by_length=True,
    )
    return benchmark.prepare(subject, count, sum(settings.lengths) / len(settings.lengths))


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    lengths = sorted({length for suite, task, length, _ in scores if (suite, task) == ("ruler", "mean")} - {0})
    found = []
    for length in lengths:
        key = ("ruler", "mean", length, "score")
        value = f"{100 * scores[key]['score']:.1f}"
        found.append(Headline(f"RULER, {length:,} tokens", key, value, quoted_bounds(scores[key])))
    return found


def _published(settings: Any) -> Published:
    of = published()["ruler"]
    rows = {}
    for method, by_length in of["by_length"].items():
        by_task = {(task, 0): value for task, value in of["tasks"][method].items()}
        rows[method] = by_task | {("mean", int(length)): value for length, value in by_length.items()}
    rows |= {name: {("mean", 0): value} for name, value in of["ablations"].items()}
    columns = {str(length): ("mean", length) for length in settings.lengths}
    span = f"{_PUBLISHED_LENGTHS[0]}-{_PUBLISHED_LENGTHS[-1]}"
    # The paper prints the mean over five lengths and four of them; the fifth follows.
    last = ("mean", _PUBLISHED_LENGTHS[-1])
    derived = {
        method: {last: len(_PUBLISHED_LENGTHS) * of["tasks"][method]["mean"] - sum(by_length.values())}
        for method, by_length in of["by_length"].items()
    }
    return Published(
        "mean of 13 tasks",
        rows,
        {**columns, span: ("mean", 0)},
        note_on("ruler"),
        model(),
        derived,
        "follows from the paper's mean over 4K to 64K and its four other lengths; it prints no row for 64K",
    )


def _limits(measured: dict, settings: Any) -> list[str]:
    found = [note.removeprefix(NOT_COMPARABLE) for note in measured.get("notes") or []]
    template = settings.ruler_template or settings.template
    if template not in ("base", "chat"):
        found.append(f"questions in RULER's template {template}")
    elif template == "chat":
        found.append("questions in the model's chat template")
    return found


def _sources(measured: dict) -> dict:
    """Which tasks are left out shows in the table."""
    made_of = measured.get("sources") or {}
    return {"sources": {name: value for name, value in made_of.items() if name != "left_out"}}


SUITE = Suite(
    name="ruler",
    title="RULER",
    about="RULER's 13 tasks in inputs of --lengths, as NVIDIA makes and scores them",
    options=(
        TEMPLATE,
        Option(
            "ruler_template",
            f"one of RULER's templates instead of --template: {', '.join(NAMED)}",
            metavar="NAME",
            refused_without_suite=True,
        ),
        Option("ruler_tasks", "some of the 13 tasks; by default all", parse=parse_names, metavar="NAMES"),
        Option("ruler_samples", "questions of each task and length", int, default=SAMPLES, minimum=1, metavar="N"),
        Option("haystack", "essays for the haystack; without it a named substitute", metavar="FILE", is_file=True),
        Option("squad", "SQuAD dev-v2.0.json, for qa_1", metavar="FILE", is_file=True),
        Option("hotpotqa", "HotpotQA dev-distractor JSON, for qa_2", metavar="FILE", is_file=True),
        Option("english_words", "word list for cwe at 128K tokens and above", metavar="FILE", is_file=True),
        Option("punkt", "NLTK's punkt_tab/english, which splits the essays", metavar="DIR", is_file=True),
        Option("ruler_seed", "seed of the questions; NVIDIA's is 42", int, default=SEED, minimum=0, metavar="N"),
    ),
    prepare=_prepare,
    real_lengths=lambda settings: {"--lengths": settings.lengths},
    inputs_from=("ruler_seed", "template", "ruler_template"),
    sources=_sources,
    means=("mean",),
    headlines=_headlines,
    tables=lambda results, labels: scores_by_task("RULER", "ruler", results, labels),
    published=_published,
    explanation=lambda measured: (
        "Questions made by RULER's generators: needles in a haystack, chains of variables, frequent words and "
        "documents. Percent, mean over the tasks asked."
    ),
    limits=_limits,
    unknown_without="retrieval among distractors, tracing and counting (RULER)",
)
