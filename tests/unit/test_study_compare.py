"""The comparison of made-up trials: its statistics against scipy, and what the pages say."""

import json

import numpy as np
import pytest
from scipy import stats
from small import assert_one_line_error, run_tool
from unit.studying import STUDY, made_up

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.intervals import t_interval
from endprompt_megatron.study.compare import compare
from endprompt_megatron.study.pages import as_html, as_markdown, write

RNG = np.random.default_rng(5)
QUESTIONS = 40
HARDNESS = RNG.normal(2.0, 0.7, QUESTIONS)  # of each question, the same for all trials
SEEDS = (1, 2, 3)


def losses(better_by: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, round(1000 * better_by) + 1000])
    return HARDNESS - better_by + rng.normal(0, 0.05) + rng.normal(0, 0.3, QUESTIONS)


@pytest.fixture(scope="module")
def values():
    found = {"base": HARDNESS + 1.0}
    for seed in SEEDS:
        found[f"short-linear-seed{seed}"] = losses(0.0, seed)
        found[f"short-yarn-seed{seed}"] = losses(0.01, seed)
        found[f"full-linear-seed{seed}"] = losses(0.8, seed)
    return found


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, values):
    return compare(made_up(tmp_path_factory.mktemp("made_up"), values))


def row(comparison: dict, name: str) -> dict:
    return next(row for row in comparison["rows"] if row["name"] == name)


def test_the_interval_over_seeds_equals_scipys():
    seeds = [0.31, 0.36, 0.29]
    expected = stats.t.interval(0.95, 2, loc=np.mean(seeds), scale=stats.sem(seeds))
    assert t_interval(seeds) == pytest.approx(expected, rel=1e-9)
    assert t_interval([0.3]) is None


def test_study_score_is_the_mean_over_seeds_with_both_intervals(comparison, values):
    (score,) = row(comparison, "full-linear")["scores"]
    trials = np.stack([values[f"full-linear-seed{seed}"] for seed in SEEDS])
    assert score["seeds"] == pytest.approx(trials.mean(axis=1).tolist())
    assert score["mean"] == pytest.approx(trials.mean())
    expected = stats.t.interval(0.95, 2, loc=trials.mean(), scale=stats.sem(trials.mean(axis=1)))
    assert score["over_seeds"] == pytest.approx(expected, rel=1e-9)
    drawn = stats.bootstrap((trials.mean(axis=0),), np.mean, n_resamples=50_000, method="percentile", rng=0)
    assert score["over_questions"] == pytest.approx(list(drawn.confidence_interval), abs=0.02)
    assert score["samples"] == QUESTIONS


def test_study_difference_is_paired_by_seed_and_request(comparison, values):
    (difference,) = row(comparison, "full-linear")["differences"]
    paired = np.stack([values[f"full-linear-seed{s}"] - values[f"short-linear-seed{s}"] for s in SEEDS])
    assert difference["difference"] == pytest.approx(paired.mean())
    test = stats.ttest_rel(
        *(np.stack([values[f"{r}-linear-seed{s}"] for s in SEEDS]).mean(1) for r in ("full", "short"))
    )
    assert difference["over_seeds"] == pytest.approx(list(test.confidence_interval(0.95)), rel=1e-9)
    drawn = stats.bootstrap((paired.mean(axis=0),), np.mean, n_resamples=50_000, method="percentile", rng=0)
    assert difference["over_questions"] == pytest.approx(list(drawn.confidence_interval), abs=0.02)
    # Questions differ far more among themselves than the two variants do: only the pairing shows it.
    assert difference["beyond_noise"]
    assert not row(comparison, "short-yarn")["differences"][0]["beyond_noise"]
    assert row(comparison, "short-linear")["differences"] == []


def test_an_untrained_model_is_compared_with_every_seed_of_the_reference(comparison, values):
    (difference,) = row(comparison, "base")["differences"]
    seeds = [float((values["base"] - values[f"short-linear-seed{s}"]).mean()) for s in SEEDS]
    assert difference["seeds"] == pytest.approx(seeds)


def test_trials_that_are_not_done_are_named_and_left_out(comparison):
    assert [each["name"] for each in comparison["rows"]] == ["base", "short-linear", "short-yarn", "full-linear"]
    assert "end_prompt-linear-seed1" in comparison["missing"]
    assert "interpolated" in comparison["missing"]
    assert "short-linear-seed1" not in comparison["missing"]


def test_variant_of_one_seed_has_the_interval_over_requests_alone(tmp_path, values):
    found = compare(made_up(tmp_path, {name: v for name, v in values.items() if name.endswith("seed1")}))
    (score,) = row(found, "full-linear")["scores"]
    assert score["over_seeds"] is None
    assert score["over_questions"] is not None
    assert row(found, "full-linear")["differences"][0]["beyond_noise"]


def test_trials_evaluated_on_other_inputs_are_refused(tmp_path, values):
    study = made_up(tmp_path, values)
    path = tmp_path / "study" / "cells" / "full-linear-seed2" / "evaluation" / "results.json"
    changed = json.loads(path.read_text()) | {"text": {"sha256": "2"}}
    path.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="base and full-linear-seed2 were evaluated on different inputs"):
        compare(study)


def test_study_pages_agree_and_mark_what_is_beyond_the_noise(tmp_path, comparison):
    written = write(comparison, tmp_path / "study", tmp_path / "page.md")
    assert [path.name for path in written] == ["study.json", "study.md", "study.html", "page.md"]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(comparison))
    markdown = as_markdown(comparison)
    assert written[1].read_text() == written[3].read_text() == markdown
    assert "Every trained variant consumed the same 4,096 tokens." in markdown
    table = markdown.split("difference to short-linear")[1].split("\n## ")[0]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert "**-0." in lines["full-linear"]
    assert "**" not in lines["short-yarn"]
    html = as_html(comparison)
    for title in (line[3:] for line in markdown.splitlines() if line.startswith("## ")):
        assert f"<h2>{title}</h2>" in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/", "")


def test_study_page_says_how_far_budgets_are_apart(tmp_path, values):
    text = STUDY.replace("train.tokens: 4096", "train.tokens: 4100").replace(
        "global_batch_size: 2", "global_batch_size: 1"
    )
    markdown = as_markdown(compare(made_up(tmp_path, values, text)))
    assert "Tokens consumed differ by 256 at most, less than a global batch (512)." in markdown


def test_a_stored_comparison_makes_its_page_again(comparison, tmp_path):
    write(comparison, tmp_path / "study")
    stored, page = tmp_path / "study" / "study.json", tmp_path / "page.md"
    said = run_tool("study", stored, "--markdown", page)
    assert said.returncode == 0, said.stderr
    assert page.read_text() == as_markdown(comparison)
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    assert_one_line_error(run_tool("study", other), str(other), "not a comparison")
    assert_one_line_error(run_tool("study", stored, "--list"), "--list: applies only to a study.yaml")


def test_paragraphs_above_a_study_stay_apart(comparison):
    page = as_html({**comparison, "about": "One & two.\n\nThree.\n"})
    assert "<p>One &amp; two.</p>\n<p>Three.</p>" in page
