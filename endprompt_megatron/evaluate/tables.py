"""Evaluation results as plain text tables for a terminal, the models side by side."""

from endprompt_megatron.evaluate.suite import BASELINE, EXTENDED


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned to the right, the first to the left."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def labels(results: dict) -> list[str]:
    """The models that were measured, the baseline first."""
    return [label for label in (BASELINE, EXTENDED) if label in results["measurements"]]


def loss_text(entry: dict) -> str:
    """Loss with its standard error where there is one."""
    error = f" ±{entry['stderr']:.3f}" if entry.get("stderr") is not None else ""
    return f"{entry['loss']:.3f}{error}"


def perplexity_text(value: float) -> str:
    """A collapsed model's thousands stay readable beside the others' tens."""
    return f"{value:,.{1 if value < 1000 else 0}f}" if value < 1e6 else f"{value:.1e}"


def terminal(results: dict) -> str:
    """Every measurement in `results` as a titled table."""
    parts, measured, names = [], results["measurements"], labels(results)
    first = measured[names[0]]
    if "perplexity" in first:
        scored = first["perplexity"]["scored"]
        header = ["length", *(f"{name} {what}" for name in names for what in ("loss", "ppl"))]
        rows = [
            [str(entries[0]["length"]), *(f(entry) for entry in entries for f in (loss_text, _perplexity_of))]
            for entries in zip(*(measured[name]["perplexity"]["by_length"] for name in names), strict=True)
        ]
        parts.append(f"Held-out text, last {scored} tokens of real inputs\n" + table(header, rows))
    if "needle" in first:
        header = ["length", "depth", *(f"{name} {what}" for name in names for what in ("found", "recall", "logprob"))]
        rows = []
        for cells in zip(*(measured[name]["needle"]["cells"] for name in names), strict=True):
            row = [str(cells[0]["length"]), f"{cells[0]['depth']:.0%}"]
            for cell in cells:
                row += [f"{cell['accuracy']:.0%}", f"{cell['recall']:.0%}", f"{cell['logprob']:.2f}"]
            rows.append(row)
        parts.append("Passkey retrieval at real input lengths\n" + table(header, rows))
    if "virtual" in first:
        for kind, title in (("repeat", "recalling a passage"), ("continue", "going on with the text")):
            header = ["virtual length", *(f"{name} {what}" for name in names for what in ("loss", "right"))]
            rows = []
            for distance in first["virtual"][kind]:
                row = [distance]
                for name in names:
                    entry = measured[name]["virtual"][kind][distance]
                    row += [f"{entry['loss']:.3f}", f"{entry['accuracy']:.0%}"]
                rows.append(row)
            physical = first["virtual"]["physical"]
            parts.append(f"Virtual distance, {title} ({physical} physical tokens)\n" + table(header, rows))
    return "\n\n".join(parts)


def _perplexity_of(entry: dict) -> str:
    return perplexity_text(entry["perplexity"])
