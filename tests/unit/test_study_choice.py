"""A study that chooses a setting on development data, and contrasts that are named before the runs."""

import json

import numpy as np
import pytest
from small import run_tool
from unit.starting import RECIPE
from unit.studying import RECALL, make_up, write_study

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.study.compare import as_json, compare
from endprompt_megatron.study.contrasts import hierarchical_means, holm
from endprompt_megatron.study.grid import read_study
from endprompt_megatron.study.pages import as_html, as_markdown
from endprompt_megatron.study.sweeps import final_trials, not_chosen, phases
from endprompt_megatron.study.trial import DEVELOP, EVALUATE, Work

STUDY = """
base: recipe.yaml
out: study
axes:
  method: {short: {context.method: short}, end_prompt: {context.method: end_prompt}}
  rate: {"0.0001": {optim.lr: 1.0e-4}, "0.001": {optim.lr: 1.0e-3}, "0.01": {optim.lr: 1.0e-2}}
  base: {one: {model.hf: one, model.init_from: one}, two: {model.hf: two, model.init_from: two}}
  seed: [1, 2]
average: [base, seed]
exclude: [{method: short, rate: "0.01"}]
untrained: {unscaled: null, linear: {context.rope.type: linear}}
overrides: {train.tokens: 4096, optim.warmup_steps: 1}
evaluation: {suite: [recall], lengths: [64, 128], text: held_out, beyond_window: true}
measures: {recall: {suite: recall, task: "64", length: 128, metric: recalled}}
choose: {over: rate, where: {base: one, seed: seed1}, evaluation: {text: development}}
contrasts: [[end_prompt, short], [end_prompt, linear]]
equivalent: 3
reference: short
"""
RECALLED = RECALL | {"metric": "recalled"}
UNTRAINED = [f"{name}-{base}" for base in ("one", "two") for name in ("unscaled", "linear")]
TRIED = {
    "short-0.0001-one-seed1": 0.5,
    "short-0.001-one-seed1": 0.75,
    "end_prompt-0.0001-one-seed1": 0.25,
    "end_prompt-0.001-one-seed1": 0.5,
    "end_prompt-0.01-one-seed1": 0.0,
}
CHOSEN = [
    f"{method}-0.001-{base}-seed{seed}"
    for seed in (1, 2)
    for base in ("one", "two")
    for method in ("short", "end_prompt")
]


def shares(share: float) -> np.ndarray:
    """Eight questions, so many of them answered."""
    return (np.arange(8) < 8 * share).astype(float)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return read_study(write_study(tmp_path, STUDY.replace("out: study", f"out: {tmp_path / 'study'}")))


@pytest.fixture
def tried(study):
    """Everything is measured on development data."""
    make_up(study, {name: shares(share) for name, share in TRIED.items()}, DEVELOP, RECALLED)
    make_up(study, {name: shares(0.125) for name in UNTRAINED if name.endswith("one")}, DEVELOP, RECALLED)
    return study


def test_all_levels_are_tried_in_one_place_and_untrained_models_measured_for_every_base(study):
    assert [trial.name for trial in study.trials if not trial.trained] == UNTRAINED
    assert [str(trial.model) for trial in study.trials if not trial.trained] == ["one", "one", "two", "two"]
    last, those = next(phases(study, study.trials))
    assert last == DEVELOP
    assert {trial.name for trial in those} == {*TRIED, "unscaled-one", "linear-one"}
    assert study.variants == ["unscaled", "linear", "short", "end_prompt"]


def test_nothing_is_final_before_all_levels_of_a_variant_are_done(study):
    some = {name: shares(share) for name, share in TRIED.items() if name != "end_prompt-0.01-one-seed1"}
    make_up(study, some, DEVELOP, RECALLED)
    assert {trial.variant for trial in final_trials(study)} == {"unscaled", "linear", "short"}
    assert {trial.levels["rate"] for trial in final_trials(study) if trial.trained} == {"0.001"}


def test_the_level_that_is_best_on_development_data_is_run_everywhere(tried):
    *_, (last, those) = phases(tried, tried.trials)
    assert last == EVALUATE
    assert {trial.name for trial in those} == {*UNTRAINED, *CHOSEN}
    losers = {"short-0.0001-one-seed1", "end_prompt-0.0001-one-seed1", "end_prompt-0.01-one-seed1"}
    assert {trial.name for trial in not_chosen(tried)} == losers


def test_a_trial_that_lost_before_and_whose_model_is_gone_is_not_evaluated(tried):
    """As where the measure was changed after `keep: scores` had removed the losers' models."""
    work = Work(tried, tried.chosen(["short-0.0001-one-seed1"])[0])
    with pytest.raises(InputError, match="was not chosen before, and keep: scores has removed its model"):
        work.refuse_changed()


def test_page_of_a_study_that_has_measured_untrained_models_alone(study):
    untrained = {name: shares(0.25) for name in UNTRAINED}
    make_up(study, {name: untrained[name] for name in UNTRAINED if name.endswith("one")}, DEVELOP, RECALLED)
    make_up(study, untrained, EVALUATE, RECALLED)
    comparison = compare(study)
    assert set(TRIED) <= set(comparison["missing"])
    assert "Choice of rate" in as_html(comparison)


def test_lower_is_better_where_the_measure_is_a_loss(tmp_path, study):
    text = STUDY.replace("metric: recalled", "metric: loss")
    study = read_study(write_study(tmp_path, text))
    make_up(study, {name: shares(share) for name, share in TRIED.items()}, DEVELOP)
    chosen = {trial.variant: trial.levels["rate"] for trial in final_trials(study) if trial.trained}
    assert chosen == {"short": "0.0001", "end_prompt": "0.01"}


def test_comparison_holds_the_choice_and_its_contrasts(tried):
    make_up(tried, {name: shares(0.5 if name.startswith("short") else 0.75) for name in CHOSEN}, EVALUATE, RECALLED)
    make_up(tried, {name: shares(0.25) for name in UNTRAINED}, EVALUATE, RECALLED)
    comparison = json.loads(as_json(compare(tried)))
    assert comparison["missing"] == []
    rows = {row["name"]: row for row in comparison["sweep"]["rows"]}
    assert rows["short"]["scores"] == {"0.0001": 0.5, "0.001": 0.75}
    assert (rows["short"]["chosen"], rows["short"]["at_edge"]) == ("0.001", True)
    assert (rows["end_prompt"]["chosen"], rows["end_prompt"]["at_edge"]) == ("0.001", False)
    assert comparison["sweep"]["untrained"] == {"unscaled": 0.125, "linear": 0.125}
    against = {(each["first"], each["second"]): each for each in comparison["contrasts"]}
    assert against["end_prompt", "short"]["difference"] == pytest.approx(0.25)
    assert against["end_prompt", "linear"]["difference"] == pytest.approx(0.5)
    assert {each["runs"] for each in against.values()} == {4}
    assert [len(row["cells"]) for row in comparison["rows"]] == [2, 2, 4, 4]
    page = as_markdown(comparison)
    assert "| short | 50.0 | **75.0** | - | yes |" in page
    assert "Untrained: unscaled 12.5, linear 12.5." in page
    assert "| end_prompt - short | +25.0 | " in page
    assert "Choice of rate" in as_html(comparison)


def test_a_trial_without_its_choice_is_named_as_missing(tried, study):
    make_up(tried, {"unscaled-one": shares(0.5)}, EVALUATE, RECALLED)
    for path in tried.directory(tried.chosen(["end_prompt-0.01-one-seed1"])[0]).glob("cell.json"):
        path.unlink()
    missing = compare(tried)["missing"]
    assert "end_prompt-0.01-one-seed1" in missing
    assert not [name for name in missing if name.startswith("end_prompt-0.001")]


def test_study_that_chooses_is_listed_and_submitted_by_phase(tried, tmp_path):
    lines = run_tool("study", tmp_path / "study.yaml", "--list").stdout.splitlines()[2:]
    states = {line.split()[0]: line for line in lines}
    assert "only if chosen" in states["short-0.0001-two-seed1"]
    assert "done" in states["short-0.0001-one-seed1"]
    assert "evaluate left" in states["short-0.001-one-seed1"]
    assert "train, export, evaluate left" in states["short-0.001-two-seed2"]


@pytest.mark.parametrize(
    ("old", "new", "needle"),
    [
        ("over: rate", "over: lr", "choose.over=lr should be an axis that is not averaged over: method, rate"),
        ("over: rate", "over: seed", "choose.over=seed should be an axis that is not averaged over"),
        ("where: {base: one,", "where: {base: three,", "choose.where: base=three should be a level of an axis"),
        ("where: {base: one,", "where: {method: short,", "choose.where: method=short should be a level of an axis"),
        ("{text: development}", "{text: held_out}", "choose.evaluation={'text': 'held_out'} should differ"),
        ("{text: development}", "{texts: a}", "choose.evaluation.texts: tools/evaluate.py has no such option"),
        ("suite: recall, task", "suite: recalls, task", "measures.recall.suite=recalls should be one of"),
        ("metric: recalled", "metric: right", "measures.recall.metric=right: recall has recalled, loss"),
        ("length: 128, ", "", "should have exactly suite, task, length and metric"),
        ("[end_prompt, linear]]", "[end_prompt, long]]", "contrasts: long is not a variant"),
        ("[end_prompt, linear]]", "end_prompt]", "should be pairs of variants"),
        ("equivalent: 3", "equivalent: some", "equivalent=some should be a number, at least 0"),
        ("average: [base, seed]", "average: [base, sed]", "average=sed is not an axis"),
        ("over: rate", "over: [rate]", "choose.over=['rate'] should be an axis"),
        ("where: {base: one,", "where: {base: [one],", "choose.where: base=['one'] should be a level of an axis"),
        ("average: [base, seed]", "average: [[base]]", "average=['base'] is not an axis"),
        ("suite: recall, task", "suite: [recall], task", "measures.recall.suite=['recall'] should be one of"),
        ('{method: short, rate: "0.01"}', "{method: short, base: one}", "exclude leaves no trial of short to choose"),
        ("measures:", "title: x\n#", "choose requires measures"),
    ],
)
def test_wrong_choice_is_refused_in_one_line(tmp_path, study, old, new, needle):
    path = write_study(tmp_path, STUDY, **{old: new})
    with pytest.raises(InputError) as raised:
        read_study(path)
    assert "\n" not in str(raised.value)
    assert needle in str(raised.value)


def test_measure_that_the_evaluation_lacks_is_refused_with_what_it_has(tmp_path, study):
    study = read_study(write_study(tmp_path, STUDY, **{'task: "64"': "task: all distances"}))
    make_up(study, {name: shares(share) for name, share in TRIED.items()}, DEVELOP, RECALLED)
    with pytest.raises(
        InputError, match="no recalled of recall, task all distances, at 128 tokens; it has recalled of"
    ):
        final_trials(study)


def test_hierarchical_draws_have_the_variance_of_each_level():
    """Of crossed questions and nested runs the variances add up, to the order of 1 / (groups x runs)."""
    rng = np.random.default_rng(3)
    groups, runs, questions = 40, 30, 400
    by_group, by_run = rng.normal(size=groups), 0.5 * rng.normal(size=(groups, runs))
    by_question = 2.0 * rng.normal(size=questions)
    data = [[[by_group[g] + by_run[g, r] + by_question] for r in range(runs)] for g in range(groups)]
    means = hierarchical_means(data, seed=1)
    middle = by_group.mean() + by_run.mean() + by_question.mean()
    of_groups = (by_group + by_run.mean(axis=1)).var() / groups
    expected = of_groups + by_run.var(axis=1).mean() / (groups * runs) + by_question.var() / questions
    assert means.mean() == pytest.approx(middle, abs=4 * np.sqrt(expected / len(means)))
    assert means.var() == pytest.approx(expected, rel=0.06)


def test_one_run_is_resampled_over_its_questions_alone_and_strata_weigh_the_same():
    one, other = np.r_[np.zeros(50), np.ones(50)], np.full(10, 3.0)
    means = hierarchical_means([[[one, other]]])
    assert means.mean() == pytest.approx((0.5 + 3.0) / 2, abs=0.002)
    assert means.std() == pytest.approx(0.05 / 2, rel=0.05)


def test_holms_adjusted_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
