"""Evaluation results as text for a terminal: every suite's tables, the models side by side, and what differs."""

from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.registry import BASELINE, EXTENDED, SUITES, Settings, suites_in
from endprompt_megatron.evaluate.tables import published_table


def terminal(results: dict) -> str:
    """Every measurement in `results` as a titled table, with intervals of 95%."""
    labels = [label for label in (BASELINE, EXTENDED) if label in results["measurements"]]
    parts = []
    for suite in suites_in(results):
        parts += suite.tables(results, labels)
        published = suite.published(Settings.of(results["settings"]))
        if published is not None:
            parts.append(published_table(suite.title, published))
    parts += _differences(results)
    parts += ["\n".join(f"Left out: {what}. {reason}" for what, reason in results.get("left_out", {}).items())]
    return "\n\n".join(filter(None, parts))


def _differences(results: dict) -> list[str]:
    """Extended minus baseline, where both were asked the same; those beyond the noise are marked."""
    compared = results.get("comparisons")
    if not compared:
        return []
    rows = []
    for each in compared:
        metric = SUITES[each["suite"]].metric(each["metric"])
        scale, digits = metric.scale, metric.digits
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
    return ["What differs, question by question (scores in percent, losses in nats)\n" + text_table(header, rows)]
