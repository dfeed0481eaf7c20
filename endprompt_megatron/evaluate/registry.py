"""The table of evaluation suites, and the settings of an evaluation, which follow from it.

Whatever lists suites iterates over SUITES: the command line and its help, asking, the terminal's tables, the plots,
the report and the study.  A suite is one `Suite` (suite.py), declared in its own file under suites/ as SUITE and
named once, below.  To add one:

1.  Write suites/NAME.py (a folder where it needs several files) with

        SUITE = Suite(name="toy", title="Toy", about="...", options=(Option(...),), prepare=_prepare, ...)

    options      what the command line takes for it (options.py).  An option's value is `settings.NAME`, its default
                 stands in results.json too.  Options that several suites share are constants in options.py.
    prepare      Subject -> Prepared: reads and checks what it needs before a model is loaded.  It raises InputError
                 for what is wrong, Unavailable for what this machine has not got: then the suite is left out where
                 others are asked.  `requires` says so of an option that was not given, `reads_text` of --text,
                 `refused_engines` of an engine.
    Prepared     requests() gives what the model is asked, one after the other, each with how it is put to an engine
                 (engines/base.py: losses of tokens, or a greedy answer).  The responses are stored as they come.
                 result(responses) makes the suite's part of results.json, series(responses) the values behind its
                 scores: from these follow score, interval and comparison with the baseline (intervals.py).
                 benchmark.py makes all of it for a benchmark of questions with `score` and `summary`.

2.  Add its SUITE to SUITES.

That is all that it takes to be asked, stored, split over processes, compared and listed.  How it is shown:

    tables       (results, labels) -> titled plain text tables for the terminal.  tables.scores_by_task makes them of
                 scores by task and length.
    drawings     results -> [Drawing]: pictures on matplotlib axes, side by side in OUT/NAME.png and in a report.
                 A drawing takes the models from results["measurements"], their names and colours from the palette.
    headlines    (measured, scores) -> [Headline]: the rows a report quotes for one model.  `measured` is
                 results["measurements"][LABEL][NAME], `scores` the model's scores by (suite, task, length, metric).
                 Rows of several models belong together where their labels are the same.
    metrics      how numbers read: unit, digits, whether lower is better.  The first is that of the headlines.
    means        tasks that average the suite's others: a table of many scores shows them first.
    quoted_tasks the tasks of the differences that a report shows first, `means` unless given.
    grid         measured -> Grid: a heat map for each model, which a report shows in the place of the drawings.
    task_names   names of tasks for a reader; "" where the suite's title says it all.
    task_note, incomplete_tasks
                 small print beside a task's name; tasks that are over less than their names say, marked with a star.
    published    settings -> Published: published scores by method and (task, length), beside ours.
    explanation, limits, unknown_without
                 plain text for a reader: what was asked; why the scores are no published benchmark's; what stays
                 unknown where the suite was not asked.
    inputs_from, sources
                 what makes its inputs: `differing_inputs` says from it whether two results can stand in one table.

Beside SUITES this module has what reports and studies need of an evaluation: BASELINE and EXTENDED, the labels of
models in results.json; `suites_in(results)`; `scores_of(results, label)`; `differing_inputs`; `option_names()`, the
keys that a study may set; `parse_suites`; `Settings.of(results["settings"])`.
"""

from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.base import checked_dtype, checked_engine
from endprompt_megatron.evaluate.options import Option, parse_names
from endprompt_megatron.evaluate.suite import (
    Drawing,
    Grid,
    Headline,
    Key,
    Metric,
    Prepared,
    Published,
    Scores,
    Subject,
    Suite,
)
from endprompt_megatron.evaluate.suites import lm_eval_suite, needle, perplexity, recall_suite, virtual
from endprompt_megatron.evaluate.suites.longbench import longbench_declaration
from endprompt_megatron.evaluate.suites.ruler import ruler_declaration
from endprompt_megatron.evaluate.tables import scores_of

__all__ = [
    "BASELINE",
    "EXTENDED",
    "GENERAL",
    "SUITES",
    "Drawing",
    "Grid",
    "Headline",
    "Key",
    "Metric",
    "Option",
    "Prepared",
    "Published",
    "Scores",
    "Settings",
    "Subject",
    "Suite",
    "all_options",
    "differing_inputs",
    "option_names",
    "parse_suites",
    "scores_of",
    "suites_in",
]

# By name, in the order in which they are asked and shown.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        perplexity.SUITE,
        needle.SUITE,
        recall_suite.SUITE,
        virtual.SUITE,
        ruler_declaration.SUITE,
        longbench_declaration.SUITE,
        lm_eval_suite.SUITE,
    )
}
BASELINE, EXTENDED = "baseline", "extended"  # labels of the models

# Options that are no suite's.
GENERAL = (
    Option("beyond_window", "measure past a model's window too", bool, default=False),
    Option("seed", "seed of passkeys, facts, probes and questions", int, default=0, minimum=0),
    Option(
        "engine", "transformers, vllm or megatron", parse=lambda _, value: checked_engine(value), default="transformers"
    ),
    Option("dtype", "bfloat16, float16 or float32", parse=lambda _, value: checked_dtype(value), default="bfloat16"),
)


def all_options() -> dict[str, Option]:
    """Every option of an evaluation by name: the suites', then the general ones."""
    return {option.name: option for suite in SUITES.values() for option in suite.options} | {
        option.name: option for option in GENERAL
    }


def option_names() -> list[str]:
    """Names of all settings but the suites: `lengths` and the options."""
    return ["lengths", *all_options()]


class Settings:
    """What to measure: `suites` by name, `lengths` of real inputs in tokens, and every option's value by its name."""

    def __init__(self, suites: list[str], lengths: list[int], **given: Any) -> None:
        """Options that are not given have their defaults.  Raises TypeError for a name that is no option's."""
        options = all_options()
        unknown = given.keys() - options
        if unknown:
            raise TypeError(f"Settings has no {', '.join(sorted(unknown))}")
        self.suites, self.lengths = suites, lengths
        for name, option in options.items():
            default = list(option.default) if isinstance(option.default, tuple) else option.default
            setattr(self, name, given.get(name, default))

    @classmethod
    def of(cls, stored: dict) -> "Settings":
        """The settings that results.json holds, whichever version wrote them."""
        known = {"suites", *option_names()}
        return cls(**{"suites": [], "lengths": []} | {name: value for name, value in stored.items() if name in known})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and vars(self) == vars(other)

    def as_dict(self) -> dict:
        """For results.json."""
        return dict(vars(self))

    def with_suites(self, suites: list[str]) -> "Settings":
        """The same with other suites."""
        return Settings(**vars(self) | {"suites": suites})

    @property
    def files(self) -> list[Path]:
        """The files that inputs are made of."""
        named = [getattr(self, option.name) for option in all_options().values() if option.is_file]
        return [Path(name) for name in named if name is not None]

    def check(self) -> None:
        """Raise InputError for a value that can never be right."""
        for option in all_options().values():
            value = getattr(self, option.name)
            option.check(value)
            owners = [suite.name for suite in SUITES.values() if option in suite.options]
            if option.refused_without_suite and value not in (None, False) and not set(owners) & set(self.suites):
                given = option.flag if value is True else f"{option.flag} {value}"
                raise InputError(
                    f"{given}: applies only to the {' and '.join(owners)} suite, which is not selected; "
                    "add it to --suite"
                )
        for name in self.suites:
            reason = SUITES[name].refused_engines.get(self.engine)
            if reason:
                raise InputError(f"--suite {name}: {reason}")


def parse_suites(value: str) -> list[str]:
    """Names of suites from a comma-separated list, in the table's order.  Raises InputError for an unknown one."""
    names = parse_names("--suite", value)
    for name in names:
        if name not in SUITES:
            raise InputError(f"--suite {name}: unknown; use some of {', '.join(SUITES)}")
    if not names:
        raise InputError(f"--suite {value!r}: names no suite; use some of {', '.join(SUITES)}")
    return [name for name in SUITES if name in names]


def suites_in(results: dict) -> list[Suite]:
    """The suites that a model in `results` was asked, in the table's order."""
    asked = {name for measured in results["measurements"].values() for name in measured}
    return [suite for suite in SUITES.values() if suite.name in asked]


def differing_inputs(suite: Suite, one: tuple[dict, str], other: tuple[dict, str]) -> list[str]:
    """Names of what made other inputs of a suite for one model than for another, each (results, label)."""
    mine, theirs = one[0], other[0]
    settings, others = mine.get("settings") or {}, theirs.get("settings") or {}
    # Results of a version that had no such option lack it, which is what they were asked: without it.
    found = [name for name in suite.inputs_from if (settings.get(name) or None) != (others.get(name) or None)]
    if suite.reads_text(Settings.of(settings)) and _text(mine) != _text(theirs):
        found.append("text")
    sources, other_sources = (
        suite.sources(results["measurements"][name][suite.name]) for results, name in (one, other)
    )
    return found + [name for name in sources if sources[name] != other_sources.get(name)]


def _text(results: dict) -> str | None:
    return (results.get("text") or {}).get("sha256")
