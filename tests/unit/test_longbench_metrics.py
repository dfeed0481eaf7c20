"""LongBench's metrics give the numbers that the benchmark's own code gave (tests/longbench/scores.json)."""

import json
import string
from pathlib import Path

import pytest

from endprompt_megatron.evaluate.suites.benchmark import Sample
from endprompt_megatron.evaluate.suites.longbench import score
from endprompt_megatron.evaluate.suites.longbench.longbench_metrics import METRICS
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import TASKS

CASES = json.loads((Path(__file__).resolve().parent.parent / "longbench" / "scores.json").read_text())["cases"]


def scored(task: str, prediction: str, answers: list[str], classes: list[str] = ()) -> float:
    sample = Sample("longbench", task, 0, 0, [], 1, answers, extra={"classes": list(classes)})
    return score(sample, prediction)


@pytest.mark.parametrize("task", sorted({case["task"] for case in CASES}))
def test_longbench_scores_equal_the_originals_to_the_last_bit(task):
    cases = [case for case in CASES if case["task"] == task]
    found = [scored(task, case["prediction"], case["answers"], case["classes"]) for case in cases]
    assert found == [case["score"] for case in cases]


def test_stored_original_scores_cover_every_longbench_metric():
    for metric in METRICS:
        scores = [case["score"] for case in CASES if TASKS[case["task"]].metric == metric]
        assert 0 in scores, metric
        assert max(scores) > 0.99, metric
        assert any(0 < value < 0.99 for value in scores), metric


@pytest.mark.parametrize(("task", "deepest"), [("gov_report", 990), ("vcsum", 989)])
def test_rouge_is_0_where_the_originals_recursion_ends(task, deepest):
    def way_back(steps: int) -> float:
        # One common word at the start: the way back through the table passes every other one.
        reference = " ".join(["c"] + [f"r{place}" for place in range(399)])
        return scored(task, " ".join(["c"] + [f"h{place}" for place in range(steps - 400)]), [reference])

    assert way_back(deepest) == pytest.approx(2 / (deepest + 1), rel=1e-4)
    assert way_back(deepest + 1) == 0


@pytest.mark.parametrize("task", [name for name in TASKS if TASKS[name].metric != "code"])
@pytest.mark.parametrize("prediction", ["", " ", "\n", "...", string.punctuation, "。，！？、", "the a an", "\u3000"])
def test_longbench_scores_answers_without_words_0(task, prediction):
    reference = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3", "passage_count": "3"}
    assert scored(task, prediction, [reference.get(task, "three sheep")], ["three sheep"]) == 0


def test_a_class_inside_the_right_one_does_not_count_and_the_next_one_is_skipped():
    classes = ["Food", "Description", "Description of something", "something"]
    right = "Description of something"
    assert scored("trec", "Description of something", [right], classes) == 1
    assert scored("trec", "Description of something, Food", [right], classes) == 0.5
    # "ood" and "oo" are both in "Food": the second of two neighbours stays, as in the original.
    assert scored("trec", "Food", ["Food"], ["ood", "oo", "Food"]) == 0.5


def test_the_similarity_of_code_is_difflibs_and_not_the_edit_distance():
    # 0.55 by rapidfuzz, which python-Levenshtein agrees with.
    assert scored("lcc", "height = total - width", ["total = width + height"]) == 0.27


def test_code_is_the_first_line_that_is_no_comment():
    answer = "```python\n# add\n// add\n    return a + b\n    return 0"
    assert scored("repobench-p", answer, ["    return a + b"]) == 1
    assert scored("repobench-p", "# add\n", ["x"]) == 0
