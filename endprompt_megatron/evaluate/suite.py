"""What an evaluation suite is: one frozen declaration of everything the rest of the project knows about it.

registry.py holds the table of all suites and documents how to add one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.options import Option
from endprompt_megatron.evaluate.requests import Request, Response

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from endprompt_megatron.evaluate.held_out_text import HeldOut
    from endprompt_megatron.evaluate.preparation import Model
    from endprompt_megatron.tokenizer import Tokenizer

Key = tuple[str, str, int, str]  # of a score: suite, task, length (0: over all), metric
Scores = dict[Key, dict]  # a model's entries of results.json's "scores"


@dataclass(frozen=True)
class Metric:
    """How a suite's numbers of one metric read: `scale` x value, with so many digits, in `unit`."""

    name: str
    scale: float = 100.0
    digits: int = 1
    unit: str = "percent"
    lower_is_better: bool = False


LOSS = Metric("loss", 1.0, 3, "nats", lower_is_better=True)


@dataclass(frozen=True)
class Subject:
    """What a suite is prepared for: one of the models, and what both models share."""

    settings: Any  # registry.Settings: the options by name
    models: dict[str, "Model"]  # by label
    label: str
    tokenizer: "Tokenizer"
    text: "HeldOut | None"  # None unless --text is given
    trained_window: int  # of the extended model, as its config says it

    @property
    def model(self) -> "Model":
        """The model that is asked."""
        return self.models[self.label]

    @property
    def tokens(self) -> "np.ndarray":
        """The held-out text as token ids, for a suite that reads it."""
        return self.text.tokens


@dataclass(frozen=True)
class Prepared:
    """A suite ready to ask one model."""

    requests: Callable[[], Iterator[Request]]  # lazily, in a fixed order
    result: Callable[[list[Response]], dict]  # its part of results.json's "measurements"
    series: Callable[[list[Response]], list[Series]]  # the values behind its scores
    expected: tuple[int, int] | None  # about how many requests and tokens; None: not known
    left_out: dict[str, str] = field(default_factory=dict)  # tasks that this machine cannot ask, and why


@dataclass(frozen=True)
class Headline:
    """One number that a report quotes."""

    label: str  # what it is: "Perplexity, 4,096 tokens"
    key: Key  # of its score, under which comparisons are found
    value: str  # as shown: "12.4", "9 of 12", "87%"
    interval: str = ""  # 95%, as shown: "11.9–13.0"; empty where there is none
    complete: bool = True  # False: over fewer tasks or questions than its label says


@dataclass(frozen=True)
class Drawing:
    """One picture.  `draw(axes, results, palette)` draws into matplotlib axes."""

    title: str
    draw: Callable[["Axes", dict, Any], None]
    caption: str = ""


@dataclass(frozen=True)
class Shade:
    """A cell of a Grid: its level, 0 to 1, what is written in it, and what is said where there is room."""

    level: float
    text: str
    second: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Grid:
    """One model's scores over two quantities, to be shown as a heat map; None where nothing was measured."""

    corner: str  # names the rows' quantity
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Shade | None, ...]], ...]
    scale: str  # what a shade says: "found"


@dataclass(frozen=True)
class Published:
    """Published scores beside ours, in percent, by method and (task, length); length 0 is over all of them."""

    heading: str  # what the scores are of: "mean of 13 tasks"
    rows: dict[str, dict[tuple[str, int], float]]
    columns: dict[str, tuple[str, int]]  # of the terminal's table: header -> (task, length)
    note: str  # which model, what, and the source
    model: str = ""  # the name of the model
    derived: dict[str, dict[tuple[str, int], float]] = field(default_factory=dict)  # not printed, but follows
    derivation: str = ""  # from what it follows


def _no_lengths(settings: Any) -> dict[str, list[int]]:
    return {}


@dataclass(frozen=True)
class Suite:
    """A suite.  Callables take `settings` (registry.Settings), `measured` (the suite's part of a model's
    "measurements" in results.json), `scores` (the model's, by key) or `results` (results.json)."""

    # What it is.
    name: str  # on the command line and in all files
    title: str  # in tables and reports
    about: str  # one line for --help: what it measures
    options: tuple[Option, ...]
    # How it is asked.
    prepare: Callable[[Subject], Prepared]  # may raise InputError, or Unavailable: then the suite is left out
    requires: dict[str, str] = field(default_factory=dict)  # option without which it is left out -> why
    reads_text: Callable[[Any], bool] = lambda settings: False  # whether it needs --text
    real_lengths: Callable[[Any], dict[str, list[int]]] = _no_lengths  # option -> its inputs' lengths, if it sets them
    refused_engines: dict[str, str] = field(default_factory=dict)  # engine -> why, and what to do instead
    # What makes its inputs: results that differ in one of these cannot stand in one table.
    inputs_from: tuple[str, ...] = ()  # names of settings
    sources: Callable[[dict], dict] = lambda measured: {}  # of `measured`
    # How its scores are read.
    metrics: tuple[Metric, ...] = (Metric("score"),)  # the first one is what headlines are of
    by_length: bool = True  # its scores come by the length of real inputs
    means: tuple[str, ...] = ()  # tasks that average others
    quoted_tasks: tuple[str, ...] = ()  # tasks whose differences a report opens with; empty: `means`
    task_names: dict[str, str] = field(default_factory=dict)  # task -> its name for a reader
    tasks_are_distances: bool = False
    headlines: Callable[[dict, Scores], list[Headline]] = lambda measured, scores: []
    losses_by_position: Callable[[dict], list[dict]] = lambda measured: []  # [{start, end, loss}] of longest inputs
    # How it is shown.
    tables: Callable[[dict, list[str]], list[str]] = lambda results, labels: []  # titled, for the terminal
    drawings: Callable[[dict], list[Drawing]] = lambda results: []
    grid: Callable[[dict], Grid | None] = lambda measured: None  # in a report in the place of the drawings
    task_note: Callable[[dict, str], str] = lambda measured, task: ""  # small print beside a task's name
    incomplete_tasks: Callable[[dict], set[str]] = lambda measured: set()  # over less than their names say
    published: Callable[[Any], Published | None] = lambda settings: None
    variant: Callable[[dict], str] = lambda measured: ""  # another title, where a variant of the suite was asked
    explanation: Callable[[dict], str] = lambda measured: ""  # a paragraph for a reader who does not know the suite
    limits: Callable[[dict, Any], list[str]] = lambda measured, settings: []  # why its scores are no published ones
    unknown_without: str = ""  # what nobody knows of a model that was not asked this

    def metric(self, name: str) -> Metric:
        """How the suite's numbers of that metric read."""
        return next((metric for metric in self.metrics if metric.name == name), Metric(name))

    def task_name(self, task: str) -> str:
        """A task's name for a reader."""
        return self.task_names.get(task, task.replace("_", " "))
