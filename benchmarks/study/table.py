#!/usr/bin/env python3
"""README's table of the study, from the stored comparison.

python benchmarks/study/table.py [results.json]
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
WINDOW, TARGET = 256, 2048
METRIC = {"recall": "recalled", "perplexity": "loss"}
# What README shows, and by which name; docs/study.md has all rows.
ROWS = {
    "base": "not extended",
    "interpolated": "interpolated, not trained",
    "yarn": "YaRN, not trained",
    "short": "the same text, no prompt, no jump (control)",
    "end_prompt": "EndPrompt (the paper's)",
    "end_prompt_random": "EndPrompt, random anchor",
    "end_prompt_pose": "ET(PoSE)",
    "pose": "PoSE",
    "longlora": "LongLoRA",
    "full": "full length",
    "recall_near": "recall prompt without the jump (control)",
    "recall": "recall prompt at the end of the window",
    "recall_random": "recall prompt, random anchor",
    "recall_multi": "recall prompts at several distances",
}


def table(comparison: dict) -> str:
    """Markdown: recall in percent and loss in nats, means over seeds, half of Student's interval behind the ±."""
    lines = [
        "| | recall at 256 | recall at 2,048 | of it at 1,408 and 1,920 | loss at 2,048 | training, CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {row["name"]: row for row in comparison["rows"]}
    for name, title in ROWS.items():
        row = rows[name]
        asked = [each for each in row["scores"] if each["metric"] == METRIC[each["suite"]]]
        scores = {(each["suite"], each["task"], each["length"]): each for each in asked}
        far = [scores["recall", distance, TARGET]["mean"] for distance in ("1408", "1920")]
        cells = [
            _percent(scores["recall", "all distances", WINDOW]),
            _percent(scores["recall", "all distances", TARGET]),
            f"{100 * sum(far) / len(far):.1f}",
            f"{scores['perplexity', 'by_length', TARGET]['mean']:.3f}",
            f"{row['cost']['cpu_seconds']['train']:.0f}" if row["training"] else "-",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(score: dict) -> str:
    bounds = score["over_seeds"]
    spread = f" ±{50 * (bounds[1] - bounds[0]):.1f}" if bounds else ""
    return f"{100 * score['mean']:.1f}{spread}"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS).read_text(encoding="utf-8"))))
