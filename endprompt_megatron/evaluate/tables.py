"""Tables of scores for a terminal, and the texts of scores and intervals in them."""

from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.suite import Published, Scores


def scores_of(results: dict, label: str) -> Scores:
    """A model's scores by suite, task, length and metric."""
    return {
        (score["suite"], score["task"], score["length"], score["metric"]): score
        for score in results.get("scores", {}).get(label, [])
    }


def bounds_text(score: dict | None, scale: float, digits: int, *, dash: str = "-", none: str = "-") -> str:
    """An interval as "81.9-88.0"; `none` where a lone sample has none."""
    if score is None or score["interval"] is None:
        return none
    return dash.join(f"{scale * bound:.{digits}f}" for bound in score["interval"])


def quoted_bounds(score: dict | None, digits: int = 1, unit: str = "") -> str:
    """A share's interval as a report quotes it: "81.9–88.0"; empty where there is none."""
    text = bounds_text(score, 100, digits, dash="–", none="")
    return text + unit if text else ""


def score_text(score: dict | None) -> str:
    """A score in percent and its interval."""
    if score is None:
        return "-"
    bounds = f" ({bounds_text(score, 100, 1)})" if score["interval"] else ""
    return f"{100 * score['score']:.1f}{bounds}"


def scores_by_task(title: str, suite: str, results: dict, labels: list[str]) -> list[str]:
    """A suite's scores by task (and length), a table for each model, with what the questions were made from."""
    parts = []
    for label in labels:
        at = {
            (task, length): score for (of, task, length, _), score in scores_of(results, label).items() if of == suite
        }
        lengths = sorted({length for _, length in at})
        if 0 in lengths[:1] and len(lengths) > 1:
            lengths = [*lengths[1:], 0]  # the mean over all lengths comes last
        tasks = list(dict.fromkeys(task for task, _ in at))
        if "mean" in tasks:
            tasks = [*(task for task in tasks if task != "mean"), "mean"]
        header = ["task", *(str(length) if length else "all" for length in lengths), "samples"]
        rows = []
        for task in tasks:
            there = [at.get((task, length)) for length in lengths]
            counts = [score["samples"] for score in there if score is not None]
            rows.append([task, *map(score_text, there), _range(counts)])
        parts.append(f"{title}, {label}: percent (95%)\n{text_table(header, rows)}")
        parts[-1] += _origin(results["measurements"][label][suite])
    return parts


def _origin(measured: dict) -> str:
    """What a suite's questions were made from, and what keeps its scores from being the published benchmark's."""
    lines = []
    if measured.get("sources"):
        made_of = {key: value for key, value in measured["sources"].items() if value}
        lines.append("made from " + "; ".join(f"{key}: {value}" for key, value in made_of.items()))
    if measured.get("prompts", "published") != "published":
        lines.append(f"prompts: {measured['prompts']}")
    notes = measured.get("notes") or []
    return "".join(f"\n  {line}" for line in [*lines, *notes])


def _range(counts: list[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def published_table(title: str, published: Published) -> str:
    """Published rows as a table of their own."""
    rows = [
        [method, *(number_text(scores.get(key)) for key in published.columns.values())]
        for method, scores in published.rows.items()
    ]
    return f"{title}, published\n{text_table([published.heading, *published.columns], rows)}\n  {published.note}"


def number_text(value: float | None) -> str:
    """A published or rounded score."""
    return "-" if value is None else f"{value:.2f}"
