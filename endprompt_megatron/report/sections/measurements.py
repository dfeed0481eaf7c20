"""One section for each evaluation suite of the table in evaluate/registry.py: what it measured, drawn and in tables.

Nothing here knows a suite by its name.  A suite that says no more than its scores is shown by a table of them.
"""

from collections.abc import Sequence

from endprompt_megatron.common.html_page import (
    Block,
    Cell,
    Details,
    Figure,
    Group,
    HeatMap,
    HeatMaps,
    Paragraph,
    Row,
    Section,
    Table,
    enumerate_words,
    missing,
    note,
)
from endprompt_megatron.common.plotting import page_palette, short
from endprompt_megatron.evaluate.registry import SUITES, Grid, Key, Metric, Published, Suite
from endprompt_megatron.model.published_shapes import plain_name
from endprompt_megatron.report.models import Measured, Model
from endprompt_megatron.report.sections import cells
from endprompt_megatron.report.sections.results import quoted

MAX_TWO_NUMBERS = 4  # columns of a heat map up to which a cell has room for a second number


def measurements(measured: Measured) -> list[Section]:
    """A section for every suite, in the table's order; one that was not run says how to run it."""
    return [_section(suite, measured) for suite in SUITES.values()]


def _section(suite: Suite, measured: Measured) -> Section:
    models = measured.of(suite)
    if not models:
        words = f"{suite.title} was not measured (`--suite {suite.name}`: {suite.about})."
        return Section(suite.name, suite.title, [missing(words)])
    last = models[-1].measured[suite.name]
    title = suite.variant(last) or suite.title
    explanation = suite.explanation(last)
    blocks: list[Block] = [Paragraph(explanation)] if explanation else []
    blocks += _pictures(suite, measured)
    published = suite.published(models[-1].settings(suite))
    if published is not None:
        blocks += note([_not_published(suite, models, published)])
        blocks.append(_beside_published(suite, models, published))
    asides = [f"† {published.derivation}." if published is not None and published.derivation else ""]
    has_more = _has_more(suite, models, published)
    asides += [cells.AS_ABOVE if published is not None or has_more else ""]
    blocks += note([*asides, *_left_out_tasks(suite, models), *measured.left_out(suite)])
    if has_more:
        blocks += _every_score(suite, models)
    if published is not None:
        blocks += _published_by_task(suite, published)
    return Section(suite.name, title, blocks)


# Pictures


def _pictures(suite: Suite, measured: Measured) -> list[Block]:
    models = measured.of(suite)
    grids = [(model, grid) for model in models if (grid := suite.grid(model.measured[suite.name])) is not None]
    if grids:
        return [HeatMaps([_heat_map(model.name, grid) for model, grid in grids], grids[0][1].scale)]
    of_suite, palette = measured.as_results(suite), page_palette({model.key: model.name for model in models})
    drawn = [
        Figure(lambda axes, each=each: each.draw(axes, of_suite, palette), each.title, each.caption)
        for each in suite.drawings(of_suite)
    ]
    return [Group(drawn)] if drawn else []


def _heat_map(name: str, grid: Grid) -> HeatMap:
    has_room = len(grid.columns) <= MAX_TWO_NUMBERS
    rows = [
        (
            title,
            [
                None
                if shade is None
                else (shade.level, Cell(shade.text, small=shade.second if has_room else "", title=shade.hint))
                for shade in row
            ],
        )
        for title, row in grid.rows
    ]
    return HeatMap(name, grid.corner, grid.columns, rows)


# Beside published scores


def _not_published(suite: Suite, models: Sequence[Model], published: Published) -> str:
    """In what these scores differ from the published ones, in one paragraph."""
    differ: dict[str, None] = {}
    others = sorted({model.origin for model in models if not _is_model(model.origin, published.model)})
    if others and published.model:
        differ[f"another model ({enumerate_words(others)})"] = None
    wanted, lengths = _published_lengths(published), _lengths(_keys(suite, models))
    if suite.by_length and lengths != wanted:
        differ[f"lengths of {_lengths_text(lengths)} tokens instead of {_lengths_text(wanted)}"] = None
    for model in models:
        differ |= dict.fromkeys(suite.limits(model.measured[suite.name], model.settings(suite)))
    based = f"Published: {published.note}."
    if not differ:
        return f"{based} These scores are of the same tasks, lengths and sources."
    return (
        f"**Not the published {suite.title}, so not to be compared with the published scores:** here "
        f"{'; '.join(differ)}. {based}"
    )


def _is_model(name: str, published: str) -> bool:
    tuned = ("instruct" in name.lower()) != ("instruct" in published.lower())
    return plain_name(name) == plain_name(published) and not tuned


def _lengths_text(lengths: Sequence[int]) -> str:
    """4K, 8K and 16K."""
    return enumerate_words([short(length) for length in lengths])


def _published_lengths(published: Published) -> list[int]:
    every = [key for scores in (published.rows, published.derived) for of in scores.values() for key in of]
    return sorted({length for _, length in every} - {0})


def _published_text(published: Published, method: str, key: tuple[str, int]) -> str:
    if key in published.rows[method]:
        return f"{published.rows[method][key]:.2f}"
    derived = published.derived.get(method, {}).get(key)
    return cells.NONE if derived is None else f"{derived:.2f} †"


def _beside_published(suite: Suite, models: Sequence[Model], published: Published) -> Table:
    """Of a suite by length its mean, a row a model; of another every published task, a column a model."""
    metric = suite.metrics[0].name
    if suite.by_length:
        mean = _mean(suite)
        keys = [(mean, length) for length in sorted({*_lengths(_keys(suite, models)), *_published_lengths(published)})]
        rows = []
        for model in models:
            scores = [cells.score(model, (suite.name, *key, metric)) for key in keys]
            overall = cells.score(model, _overall(suite, model))
            rows.append(Row(model.name, [*scores, overall, cells.counts(_samples(model, suite))]))
        for method in published.rows:
            scores = [_published_text(published, method, key) for key in [*keys, (mean, 0)]]
            rows.append(Row(f"{method}, published", [*scores, cells.NONE], kind="paper"))
        head = [*(short(length) for _, length in keys), "mean", "samples"]
        return Table(head, rows, "Percent; samples are requests for each task and length.", kind="scores")
    own = {key[1] for key in _keys(suite, models)}
    tasks = _published_tasks(published)
    means = [mean for mean in suite.means if mean in own or mean in tasks]
    rows = []
    for task in [*(task for task in tasks if task not in means), *means]:
        ours = [cells.score(model, (suite.name, task, 0, metric)) for model in models]
        theirs = [_published_text(published, method, (task, 0)) for method in published.rows]
        rows.append(Row(_task(suite, models, task), [*ours, *theirs]))
    head = [*(model.name for model in models), *(Cell(method, small="published") for method in published.rows)]
    return Table(head, rows, "Percent.", [*(model.key for model in models), *["paper"] * len(published.rows)])


def _published_tasks(published: Published) -> list[str]:
    return list(dict.fromkeys(task for of in published.rows.values() for task, _ in of))


def _published_by_task(suite: Suite, published: Published) -> list[Details]:
    """Of a suite by length the published means over all lengths, folded."""
    tasks = dict.fromkeys(task for of in published.rows.values() for task, length in of if not length)
    if not suite.by_length or not tasks.keys() - set(suite.means):
        return []
    rows = [Row(task, [_published_text(published, method, (task, 0)) for method in published.rows]) for task in tasks]
    lengths = _published_lengths(published)
    title = f"By task: published, mean over {short(lengths[0])} to {short(lengths[-1])} tokens"
    return [Details(title, [Table(list(published.rows), rows)])]


# Every score


def _keys(suite: Suite, models: Sequence[Model]) -> list[Key]:
    """Every score of the suite that a model has."""
    return list(dict.fromkeys(key for model in models for key in model.scores if key[0] == suite.name))


def _lengths(keys: Sequence[Key]) -> list[int]:
    return sorted({length for _, _, length, _ in keys} - {0})


def _mean(suite: Suite) -> str:
    """The task that stands for the suite."""
    return (suite.means or suite.quoted_tasks)[0]


def _overall(suite: Suite, model: Model) -> Key:
    """The mean over all lengths; that of the only one where there is one."""
    lengths = _lengths(_keys(suite, [model]))
    return (suite.name, _mean(suite), lengths[0] if len(lengths) == 1 else 0, suite.metrics[0].name)


def _samples(model: Model, suite: Suite) -> list[int]:
    """Of each task and length."""
    return [
        score["samples"]
        for (of, task, length, metric), score in model.scores.items()
        if (of, metric) == (suite.name, suite.metrics[0].name) and task not in suite.means and length
    ]


def _has_more(suite: Suite, models: Sequence[Model], published: Published | None) -> bool:
    """Whether there are scores that neither the Results table nor that of published scores has."""
    shown = {each.key for model in models for each in quoted(suite, model)}
    if published is not None and not suite.by_length:
        shown |= {(suite.name, task, 0, suite.metrics[0].name) for task in _published_tasks(published)}
    return any(key not in shown for key in _keys(suite, models))


def _every_score(suite: Suite, models: Sequence[Model]) -> list[Details]:
    """All scores, folded: by task and length a table a model, by task alone a column a model."""
    keys = _keys(suite, models)
    metrics = [suite.metric(name) for name in dict.fromkeys(key[3] for key in keys)]
    if _lengths(keys):
        return [
            Details(f"By task: {model.name}", [_by_length(suite, model, metric) for metric in metrics])
            for model in models
        ]
    return [Details("By task", [_by_model(suite, models, metric) for metric in metrics])]


def _by_length(suite: Suite, model: Model, metric: Metric) -> Table:
    keys = [key for key in _keys(suite, [model]) if key[3] == metric.name]
    lengths = [*_lengths(keys), *([0] if any(not length for _, _, length, _ in keys) else [])]
    rows = []
    for task in _in_order(suite, keys):
        scores = [cells.score(model, (suite.name, task, length, metric.name)) for length in lengths]
        samples = [model.scores[key]["samples"] for key in keys if key[1] == task]
        rows.append(Row(_task(suite, [model], task), [*scores, cells.counts(samples)]))
    head = [*(short(length) if length else "all" for length in lengths), "samples"]
    return Table(head, rows, _caption(suite, metric), kind="scores")


def _by_model(suite: Suite, models: Sequence[Model], metric: Metric) -> Table:
    keys = [key for key in _keys(suite, models) if key[3] == metric.name]
    rows = []
    for task in _in_order(suite, keys):
        scores = [cells.score(model, (suite.name, task, 0, metric.name)) for model in models]
        own = [key for key in keys if key[1] == task]
        samples = [model.scores[key]["samples"] for model in models for key in own if key in model.scores]
        rows.append(Row(_task(suite, models, task), [*scores, cells.counts(samples)]))
    return Table([*(model.name for model in models), "samples"], rows, _caption(suite, metric))


def _in_order(suite: Suite, keys: Sequence[Key]) -> list[str]:
    """Tasks in the order of their scores, those that average others last."""
    tasks = list(dict.fromkeys(key[1] for key in keys))
    return sorted(tasks, key=lambda task: task in suite.means)


def _caption(suite: Suite, metric: Metric) -> str:
    name = f"{metric.name.replace('_', ' ').capitalize()}, {metric.unit}" if len(suite.metrics) > 1 else metric.unit
    return f"{name[0].upper()}{name[1:]}{', lower is better' if metric.lower_is_better else ''}."


def _task(suite: Suite, models: Sequence[Model], task: str) -> Cell:
    """A task's name, with the suite's small print beside it."""
    name = f"{int(task):,} tokens away" if suite.tasks_are_distances and task.isdigit() else suite.task_name(task)
    notes = (suite.task_note(model.measured[suite.name], task) for model in models)
    return Cell(name or task.replace("_", " "), small=next(filter(None, notes), ""))


def _left_out_tasks(suite: Suite, models: Sequence[Model]) -> list[str]:
    """Tasks that could not be asked, and why."""
    left_out = {
        name: reason
        for model in models
        for name, reason in (model.measured[suite.name].get("left_out") or {}).items()
        if reason != "not asked"
    }
    return ["Left out: " + "; ".join(f"{name} ({why})" for name, why in left_out.items()) + "."] if left_out else []
