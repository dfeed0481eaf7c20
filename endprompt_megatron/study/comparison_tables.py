"""The tables of a study's comparison, from study.json: budgets, choices, contrasts, scores, differences, cost."""

from dataclasses import dataclass

from endprompt_megatron.evaluate.registry import SUITES, Key, Metric, Suite

POSITIONS = "Loss by position in the longest inputs"


@dataclass(frozen=True)
class ScoreTable:
    """A table of texts with its title and note; `marks`: the (row, column) of cells to set in bold."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    marks: frozenset[tuple[int, int]] = frozenset()


def tables(comparison: dict) -> list[ScoreTable]:
    """Budgets, choices, contrasts, scores, losses by position, differences to the reference, cost."""
    found = [_budgets(comparison), *_sweep(comparison), *_contrasts(comparison), *_scores(comparison)]
    position = _positions(comparison)
    found += [position] if position else []
    found += _differences(comparison)
    return [*found, _cost(comparison)]


def _budgets(comparison: dict) -> ScoreTable:
    rows = []
    for variant in comparison["rows"]:
        t = variant["training"]
        cells = [variant["name"], str(len(variant["cells"]))]
        if t is None:
            cells += ["not trained", *["-"] * 6]
        else:
            numbers = (t["tokens"], t["steps"], t["global_batch_size"], t["physical"], t["samples"])
            cells += [t["method"], t["rope"], *(f"{number:,}" for number in numbers)]
        rows.append(cells)
    trained = [variant["training"] for variant in comparison["rows"] if variant["training"]]
    note = ""
    if trained:
        tokens = [t["tokens"] for t in trained]
        apart, batch = max(tokens) - min(tokens), max(t["global_batch_size"] * t["physical"] for t in trained)
        note = (
            f"Tokens consumed differ by {apart:,} at most, less than a global batch ({batch:,})."
            if apart
            else f"Every trained variant consumed the same {tokens[0]:,} tokens."
        )
    sequences = ["sequences a step", "tokens a sequence", "sequences"]
    header = ["variant", "seeds", "method", "RoPE", "tokens", "steps", *sequences]
    return ScoreTable("Training budgets", note, header, rows)


def _sweep(comparison: dict) -> list[ScoreTable]:
    """The development scores by level, where the study chose."""
    sweep = comparison.get("sweep")
    if not sweep:
        return []
    of, metric = sweep["measure"], SUITES[sweep["measure"]["suite"]].metric(sweep["measure"]["metric"])
    levels = list(dict.fromkeys(level for row in sweep["rows"] for level in row["scores"]))
    rows, marks = [], set()
    for row in sweep["rows"]:
        if row["chosen"] is not None:
            marks.add((len(rows), 1 + levels.index(row["chosen"])))
        values = [row["scores"].get(level) for level in levels]
        cells = ["-" if value is None else f"{metric.scale * value:.{metric.digits}f}" for value in values]
        rows.append([row["name"], *cells, "yes" if row["at_edge"] else ""])
    where = ", ".join(f"{axis} {level}" for axis, level in sweep["where"].items())
    untrained = ", ".join(
        f"{name} {metric.scale * value:.{metric.digits}f}" for name, value in sweep["untrained"].items()
    )
    note = (
        f"On development data{f' ({where})' if where else ''}: {_in_words(of)}; {metric.unit}, "
        f"{'lower' if metric.lower_is_better else 'higher'} is better. Bold: the level that the variant keeps in all "
        "tables below. At the edge: a better one may lie beyond what was tried."
        + (f" Untrained: {untrained}." if untrained else "")
    )
    return [ScoreTable(choice_title(comparison), note, ["variant", *levels, "at the edge"], rows, frozenset(marks))]


def _in_words(measure: dict) -> str:
    lengths = ", ".join(f"{length:,}" for length in measure["lengths"])
    return f"{measure['metric']} of {measure['suite']}, {measure['task']}, mean over inputs of {lengths} tokens"


def choice_title(comparison: dict) -> str:
    """Title of the table of choices, and of the figure above it."""
    return f"Choice of {comparison['sweep']['over']}"


def _contrasts(comparison: dict) -> list[ScoreTable]:
    """A table a measure of the contrasts that were named before the runs."""
    by_measure: dict[str, list[dict]] = {}
    for each in comparison.get("contrasts", []):
        by_measure.setdefault(each["measure"]["name"], []).append(each)
    found = []
    for name, contrasts in by_measure.items():
        of, margin = contrasts[0]["measure"], contrasts[0]["margin"]
        metric = SUITES[of["suite"]].metric(of["metric"])
        rows, marks = [], set()
        for each in contrasts:
            if each["verdict"] != "undecided":
                marks.add((len(rows), 5))
            bounds = " to ".join(f"{metric.scale * bound:+.{metric.digits}f}" for bound in each["interval"])
            difference = f"{metric.scale * each['difference']:+.{metric.digits}f}"
            p = "<0.001" if each["p"] < 0.001 else f"{each['p']:.3f}"
            pair = f"{each['first']} - {each['second']}"
            rows.append([pair, difference, bounds, p, str(each["runs"]), each["verdict"]])
        unit = "percentage points" if metric.unit == "percent" else metric.unit
        note = (
            f"{_in_words(of).capitalize()}; {unit}, {'negative' if metric.lower_is_better else 'positive'}: "
            "the first is better. Interval of 95%: a hierarchical bootstrap over base models, seeds and questions; "
            "p: two-sided, Holm's over the rows."
        )
        if margin:
            note += (
                f" Equivalent: the interval of 90% lies within {metric.scale * margin:g} {unit} of 0, whatever p says."
            )
        header = ["contrast", "difference", "95% interval", "p", "runs", "verdict"]
        found.append(ScoreTable(f"Contrasts: {name}", note, header, rows, frozenset(marks)))
    return found


def key_of(score: dict) -> Key:
    """Suite, task, length and metric."""
    return score["suite"], score["task"], score["length"], score["metric"]


def known_keys(comparison: dict, part: str) -> list[Key]:
    """The keys of all scores (`part`: "scores" or "differences") of suites that there still are."""
    keys = dict.fromkeys(key_of(score) for variant in comparison["rows"] for score in variant[part])
    return [key for key in keys if key[0] in SUITES]


def metric_of(key: Key) -> Metric:
    """How the scores of a key read."""
    return SUITES[key[0]].metric(key[3])


def distance_of(key: Key) -> int | None:
    """The distance that a score is of, in tokens; None where it is of something else."""
    return int(key[1]) if SUITES[key[0]].tasks_are_distances and key[1].isdigit() else None


def groups(keys: list[Key]) -> list[tuple[str, list[Key]]]:
    """Titles of tables and their columns.

    A suite with many tasks and lengths has its mean over tasks by length, and where tasks are distances a table of
    those in the longest inputs; one with few of them has them all.
    """
    found = []
    for name, metric in dict.fromkeys((key[0], key[3]) for key in keys):
        suite: Suite = SUITES[name]
        own = [key for key in keys if (key[0], key[3]) == (name, metric)]
        lengths = {key[2] for key in own}
        summary = [key for key in own if key[1] in suite.means]
        title = f"{suite.title}, {metric}"
        if len(own) <= 8 or not summary or len(lengths) == 1:
            found.append((title, own))
            continue
        found.append((f"{title}, {summary[0][1]}", summary))
        distances = [key for key in own if distance_of(key) is not None and key[2] == max(lengths)]
        if distances:
            found.append((f"{title}, by distance in inputs of {max(lengths):,} tokens", distances))
    return found


def _columns(keys: list[Key]) -> list[str]:
    several_tasks = len({key[1] for key in keys}) > 1
    several_lengths = len({key[2] for key in keys}) > 1
    heads = []
    for key in keys:
        _, task, length, _ = key
        task = task if distance_of(key) is None else f"{distance_of(key):,}"
        words = [task] * several_tasks + [f"{length:,}" if length else "all"] * (several_lengths or not several_tasks)
        heads.append(" at ".join(words))
    return heads


def _scores(comparison: dict) -> list[ScoreTable]:
    found = []
    for title, keys in groups(known_keys(comparison, "scores")):
        metric = metric_of(keys[0])
        rows, means = [], []
        for variant in comparison["rows"]:
            at = {key_of(score): score for score in variant["scores"]}
            rows.append([variant["name"], *(_value(at.get(key), metric) for key in keys)])
            trained = variant["trained"]
            means.append([at[key]["mean"] if trained and key in at else None for key in keys])
        marks = set()
        for column in range(len(keys)):
            there = [(values[column], line) for line, values in enumerate(means) if values[column] is not None]
            best = (min if metric.lower_is_better else max)(there, default=(None, 0))[0]
            marks |= {(line, column + 1) for value, line in there if value == best}
        note = (
            f"{metric.unit.capitalize()}, {'lower' if metric.lower_is_better else 'higher'} is better; mean over "
            "seeds, ± half of Student's 95% interval over seeds where there are several. Bold: the best trained "
            "variant."
        )
        found.append(ScoreTable(title, note, ["variant", *_columns(keys)], rows, frozenset(marks)))
    return found


def _value(score: dict | None, metric: Metric) -> str:
    if score is None:
        return "-"
    text = f"{metric.scale * score['mean']:.{metric.digits}f}"
    if score["over_seeds"] is not None:
        low, high = score["over_seeds"]
        text += f" ±{metric.scale * (high - low) / 2:.{metric.digits}f}"
    return text


def _positions(comparison: dict) -> ScoreTable | None:
    with_losses = [variant for variant in comparison["rows"] if variant["by_position"]]
    if not with_losses:
        return None
    buckets = with_losses[0]["by_position"]
    every = max(1, len(buckets) // 8)
    chosen = [range(start, min(start + every, len(buckets))) for start in range(0, len(buckets), every)]
    header = ["variant", *(f"{buckets[of[0]]['start']:,}-{buckets[of[-1]]['end']:,}" for of in chosen)]
    rows = []
    for variant in with_losses:
        losses = [variant["by_position"][place] for place in range(len(buckets))]
        cells = []
        for of in chosen:
            tokens = [losses[place]["end"] - losses[place]["start"] for place in of]
            total = sum(losses[place]["loss"] * count for place, count in zip(of, tokens, strict=True))
            cells.append(f"{total / sum(tokens):.3f}")
        rows.append([variant["name"], *cells])
    return ScoreTable(POSITIONS, "Nats, mean over seeds.", header, rows)


def _differences(comparison: dict) -> list[ScoreTable]:
    reference, found = comparison["reference"], []
    if reference is None:
        return []
    for title, keys in groups(known_keys(comparison, "differences")):
        metric = metric_of(keys[0])
        better = "negative is better" if metric.lower_is_better else "positive is better"
        unit = "percentage points" if metric.unit == "percent" else f"{metric.unit}, {better}"
        rows, marks = [], set()
        for variant in comparison["rows"]:
            at = {key_of(each): each for each in variant["differences"]}
            if not at:
                continue
            for column, key in enumerate(keys):
                if key in at and at[key]["beyond_noise"]:
                    marks.add((len(rows), column + 1))
            rows.append([variant["name"], *(_change(at.get(key), metric) for key in keys)])
        note = (
            f"Variant minus {reference}, request by request and seed by seed ({unit}); in brackets the wider of the "
            "two 95% intervals, over seeds and over requests. Bold: neither contains 0. Each comparison stands alone: "
            "of twenty that differ by chance alone, about one is bold."
        )
        header = ["variant", *_columns(keys)]
        found.append(ScoreTable(f"{title}: difference to {reference}", note, header, rows, frozenset(marks)))
    return found


def _change(each: dict | None, metric: Metric) -> str:
    if each is None:
        return "-"
    text = f"{metric.scale * each['difference']:+.{metric.digits}f}"
    bounds = [b for b in (each["over_seeds"], each["over_questions"]) if b is not None]
    if bounds:
        low, high = max(bounds, key=lambda b: b[1] - b[0])
        text += " ({})".format(" to ".join(f"{metric.scale * bound:+.{metric.digits}f}" for bound in (low, high)))
    return text


def _cost(comparison: dict) -> ScoreTable:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for variant in comparison["rows"]:
        cost = variant["cost"]
        rows.append(
            [
                variant["name"],
                number(cost["step_seconds"], ",.1f"),
                number(cost["tokens_per_s"], ",.0f"),
                number(cost["memory_gib"], ".2f"),
                number(cost["cpu_seconds"].get("train"), ",.0f"),
                number(cost["seconds"].get("train"), ",.0f"),
                number(cost["seconds"].get("evaluate"), ",.0f"),
            ]
        )
    header = ["variant", "steps, s", "tokens/s", "peak memory, GiB", "training, CPU s", "training, s", "evaluation, s"]
    note = (
        "Per trial, mean over seeds (memory: the highest of a rank). Steps: the sum of the steps' times; training and "
        "evaluation include the start of their processes."
    )
    return ScoreTable("Cost", note, header, rows)
