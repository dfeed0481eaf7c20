"""RUN/data_seen.json of real runs: written with every checkpoint, exact after a resume, the order its recipe's."""

import json

from unit.starting import write_tokens


def test_data_seen_counts_on_after_a_resume(place, extend):
    write_tokens(place / "other", 600, seed=3)
    blend = "data.train={train: 3, other: {weight: 1, prompts: [EP_2]}}"
    arguments = ["recipe.yaml", blend, "checkpoint.interval=2", "context.prompts=[EP_1,EP_3]"]

    def read(run: str) -> dict:
        return json.loads((place / run / "data_seen.json").read_text())

    for steps in (3, 7):
        ran = extend(place, *arguments, f"train.steps={steps}", "checkpoint.dir=run")
        assert ran.returncode == 0, ran.stderr
        assert read("run")["consumed_samples"] == 8 * steps
    whole = extend(place, *arguments, "train.steps=7", "checkpoint.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert read("run") == read("whole")
    train, other = read("run")["sources"]
    assert (train["samples"], other["samples"]) == (42, 14)
    assert train["context_tokens"] + train["prompt_tokens"] == 42 * 64
    assert (other["context_tokens"], other["prompt_tokens"]) == (14 * 63, 14)
    assert other["epochs"] == 14 / (600 // 63)

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (place / run / "metrics.jsonl").read_text().splitlines()]

    # A run that was first asked for 3 steps read the samples of the one that was asked for 7 at once.
    assert losses("run") == losses("whole")


def test_a_resume_with_other_document_ends_is_refused(place, extend):
    assert extend(place, "recipe.yaml", "train.steps=3").returncode == 0
    other = extend(place, "recipe.yaml", "train.steps=4", "data.document_ends=within")
    assert other.returncode == 2
    assert "data.document_ends=within" in other.stderr
    assert "was trained with cross" in other.stderr
