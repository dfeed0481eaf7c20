"""Tables of scores with their intervals: RULER by task and length, LongBench by group, what differs beyond the noise.

Published rows stand beside ours from published.json, which names their source.
"""

import json
from pathlib import Path

TITLES = {"ruler": "RULER", "longbench": "LongBench", "short": "Short text"}
Scores = dict[tuple[str, str, str, int, str], dict]  # (label, suite, task, length, metric)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned to the right, the first to the left."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def scores_by_key(results: dict) -> Scores:
    """results["scores"] by label, suite, task, length and metric."""
    return {
        (label, *(score[key] for key in ("suite", "task", "length", "metric"))): score
        for label, scores in results.get("scores", {}).items()
        for score in scores
    }


def lookup(scores: Scores, label: str, suite: str, task: str, length: int, metric: str) -> dict | None:
    """A score, None where there is none."""
    return scores.get((label, suite, task, length, metric))


def bounds_text(score: dict | None, scale: float, digits: int) -> str:
    """An interval as "81.9-88.0"; "-" where a lone sample has none."""
    if score is None or score["interval"] is None:
        return "-"
    return "-".join(f"{scale * bound:.{digits}f}" for bound in score["interval"])


def score_text(score: dict | None) -> str:
    """A score in percent and its interval."""
    if score is None:
        return "-"
    bounds = f" ({bounds_text(score, 100, 1)})" if score["interval"] else ""
    return f"{100 * score['score']:.1f}{bounds}"


def published() -> dict:
    """The published rows."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def of_questions(results: dict, suite: str, names: list[str]) -> list[str]:
    """A suite's scores by task (and length), a table a model, and the published rows below.

    LongBench-E has a table by words as well, and no published rows: the paper reports LongBench.
    """
    extended = suite == "longbench" and bool(results["settings"].get("longbench_e"))
    title, parts = f"{TITLES[suite]}-E" if extended else TITLES[suite], []
    for label in names:
        own = [score for score in results["scores"][label] if score["suite"] == suite]
        lengths = sorted({score["length"] for score in own})
        if 0 in lengths[:1] and len(lengths) > 1:
            lengths = [*lengths[1:], 0]  # the mean over all lengths comes last
        at = {(score["task"], score["length"]): score for score in own}
        tasks = list(dict.fromkeys(task for task, _ in at))
        if "mean" in tasks:
            tasks = [*(task for task in tasks if task != "mean"), "mean"]
        header = ["task", *(str(length) if length else "all" for length in lengths), "samples"]
        rows = []
        for task in tasks:
            there = [at.get((task, length)) for length in lengths]
            counts = [score["samples"] for score in there if score is not None]
            rows.append([task, *map(score_text, there), _range(counts)])
        parts.append(f"{title}, {label}: percent (95%)\n{table(header, rows)}")
        parts[-1] += _origin(results["measurements"][label][suite])
        if extended:
            parts.append(f"{title}, {label}: percent by words of the input\n{_by_words(results, label)}")
    return parts if extended else parts + _published(suite, results)


def _by_words(results: dict, label: str) -> str:
    by_words = results["measurements"][label]["longbench"]["by_words"]
    header = ["task", *next(iter(by_words.values()))]
    return table(header, [[task, *map(_number, of.values())] for task, of in by_words.items()])


def _origin(summary: dict) -> str:
    """What a suite's questions were made from, and what keeps its scores from being the published benchmark's."""
    lines = []
    if summary.get("sources"):
        made_of = {key: value for key, value in summary["sources"].items() if value}
        lines.append("made from " + "; ".join(f"{key}: {value}" for key, value in made_of.items()))
    if summary.get("prompts", "published") != "published":
        lines.append(f"prompts: {summary['prompts']}")
    notes = summary.get("notes") or []
    return "".join(f"\n  {line}" for line in [*lines, *notes])


def _range(counts: list[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def _published(suite: str, results: dict) -> list[str]:
    rows = published()
    if suite == "ruler":
        lengths = list(map(str, results["settings"]["lengths"]))
        by_length, tasks = rows["ruler"]["by_length"], rows["ruler"]["tasks"]
        header = ["mean of 13 tasks", *lengths, "4096-65536"]
        body = [
            [name, *(_number(of.get(length)) for length in lengths), _number(tasks[name]["mean"])]
            for name, of in by_length.items()
        ]
    elif suite == "longbench":
        groups = rows["longbench"]["groups"]
        columns = list(next(iter(groups.values())))
        header, body = ["group", *columns], [[name, *map(_number, of.values())] for name, of in groups.items()]
    else:
        tasks = rows["short"]["tasks"]
        header = ["task", *next(iter(tasks.values()))]
        body = [[name, *map(_number, of.values())] for name, of in tasks.items()]
    note = f"{rows['model']}; {rows[suite]['what']}; {rows['source']}"
    return [f"{TITLES[suite]}, published\n{table(header, body)}\n  {note}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def differences(results: dict) -> list[str]:
    """Extended minus baseline, where both were asked the same; those beyond the noise are marked."""
    found = results.get("comparisons")
    if not found:
        return []
    rows = []
    for each in found:
        scale, digits = (1, 3) if each["metric"] == "loss" else (100, 1)
        low_high = "-" if not each["interval"] else " to ".join(f"{scale * b:+.{digits}f}" for b in each["interval"])
        rows.append(
            [
                f"{each['suite']} {each['task']}",
                str(each["length"] or "all"),
                each["metric"],
                str(each["samples"]),
                f"{scale * each['difference']:+.{digits}f}",
                low_high,
                "-" if each["p"] is None else f"{each['p']:.3f}",
                "yes" if each["beyond_noise"] else "no",
            ]
        )
    header = ["extended minus baseline", "length", "of", "samples", "change", "95%", "p", "beyond noise"]
    return ["What differs, question by question (scores in percent, losses in nats)\n" + table(header, rows)]
