#!/usr/bin/env python3
"""The tables of the study in README and docs/rope.md, from the stored comparison.

python benchmarks/study/table.py [results.json]
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
WINDOW, TARGET, BEYOND, FAR = 256, 2048, (1024, 1536, 2048), "1920"
METRIC = {"recall": "recalled", "perplexity": "loss"}
# What README shows, and by which name; docs/study.md has all rows.
ROWS = {
    "unscaled": "not extended",
    "linear": "linear (PI), not trained",
    "ntk": "NTK, not trained",
    "yarn": "YaRN, not trained",
    "short": "linear, the same text, no prompt, no jump (control)",
    "end_prompt": "linear, EndPrompt (the paper's)",
    "end_prompt_pose": "linear, ET(PoSE)",
    "pose": "linear, PoSE",
    "cream": "linear, CREAM",
    "longlora": "linear, LongLoRA",
    "full": "linear, full length",
    "recall_near": "linear, recall prompt without the jump (control)",
    "recall": "linear, recall prompt at the end of the window",
    "short_yarn": "YaRN, no prompt, no jump (control)",
    "end_prompt_yarn": "YaRN, EndPrompt",
    "pose_yarn": "YaRN, PoSE",
    "recall_yarn": "YaRN, recall prompt at the end of the window",
    "full_yarn": "YaRN, full length",
}
# What docs/rope.md shows: the scalings untrained, and under the control and full length.
SCALINGS = {
    name: ROWS[name] for name in ("unscaled", "linear", "ntk", "yarn", "short", "short_yarn", "full", "full_yarn")
}


def table(comparison: dict, shown: dict[str, str] = ROWS) -> str:
    """Markdown: recall in percent and loss in nats, means over base models."""
    lines = [
        "| | rate | recall at 256 | beyond 256 | of it 1,920 back | loss at 2,048 | training, CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {row["name"]: row for row in comparison["rows"]}
    chosen = {row["name"]: float(row["chosen"]) for row in comparison["sweep"]["rows"]}
    for name, title in shown.items():
        row = rows[name]
        asked = [each for each in row["scores"] if each["metric"] == METRIC[each["suite"]]]
        scores = {(each["suite"], each["task"], each["length"]): each["mean"] for each in asked}
        beyond = [scores["recall", "all distances", length] for length in BEYOND]
        cells = [
            f"{chosen[name]:g}" if name in chosen else "-",
            f"{100 * scores['recall', 'all distances', WINDOW]:.1f}",
            f"{100 * sum(beyond) / len(beyond):.1f}",
            f"{100 * scores['recall', FAR, TARGET]:.1f}",
            f"{scores['perplexity', 'by_length', TARGET]:.3f}",
            f"{row['cost']['cpu_seconds']['train']:.0f}" if row["training"] else "-",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    stored = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS).read_text(encoding="utf-8"))
    print(table(stored), table(stored, SCALINGS), sep="\n\n")
