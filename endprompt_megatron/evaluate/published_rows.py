"""Published scores that stand beside ours: published.json, which names their source."""

import functools
import json
from pathlib import Path


@functools.cache
def published() -> dict:
    """All of them: "source", "model", and by suite "what" they are and the rows.  Not to be changed."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def model() -> str:
    """The name of the model that the rows are of."""
    return published()["model"].split(",")[0]


def note_on(suite: str) -> str:
    """Which model, what, and the source, for below a table."""
    rows = published()
    return f"{rows['model']}; {rows[suite]['what']}; {rows['source']}"
