"""The report's numbers are evaluate's own; what cannot be compared stays apart and says why."""

import json
import math
import shutil

import numpy as np
import pytest
import small
import yaml
from unit import reports
from unit.test_report import checked

from endprompt_megatron.common.html_page import DARK, LIGHT
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.distributed.hardware import of_kind
from endprompt_megatron.evaluate.intervals import compare_intervals
from endprompt_megatron.method.distances import distance_counts
from endprompt_megatron.method.positions import position_ids
from endprompt_megatron.model.published_shapes import shape_for
from endprompt_megatron.plan.plan import make_plan
from endprompt_megatron.report.models import measured_models
from endprompt_megatron.report.page import write_report
from endprompt_megatron.report.run_files import read_run, read_runs
from endprompt_megatron.report.sections import cost, distance_coverage


@pytest.fixture
def results(measured):
    return json.loads((measured / "run" / "evaluation" / "results.json").read_text())


@pytest.fixture(scope="module")
def one(measured, tmp_path_factory):
    """The page of the whole run, and its text."""
    page = write_report([measured / "run"], out=tmp_path_factory.mktemp("one") / "page.html").read_text()
    return page, checked(page)


def score(results, label, suite, task, length):
    wanted = (suite, task, length)
    return next(s for s in results["scores"][label] if (s["suite"], s["task"], s["length"]) == wanted)


def part(page, key):
    """One section's text."""
    start = page.index(f'<section id="{key}">')
    return checked(page[start : page.index("</section>", start)] + "</section>")


@pytest.mark.parametrize("label", ["baseline", "extended"])
def test_report_has_ruler_by_length_and_task_as_evaluated(one, results, label):
    text = part(one[0], "ruler")
    for task in ("mean", "niah_single_1", "vt", "qa_1"):
        for length in reports.LENGTHS:
            found = score(results, label, "ruler", task, length)
            low, high = (f"{100 * bound:.1f}" for bound in found["interval"])
            assert f"{100 * found['score']:.1f}" in text
            assert f"{low}–{high}" in text
    assert "samples" in text


def test_report_shows_published_ruler_and_how_its_own_differs(one):
    text = part(one[0], "ruler")
    for number in ("90.92", "82.41", "83.48", "82.99", "76.03", "43.65 †"):
        assert number in text
    assert "Not the published RULER, so not to be compared" in text
    for reason in ("another model (Tiny-Llama-base)", "4 of 13 tasks", "4 samples a task and length instead of 500"):
        assert reason in text
    assert "Meta-Llama-3-8B" in text


def test_report_does_not_warn_of_the_papers_own_model(measured, tmp_path, results):
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    for label in ("baseline", "extended"):
        results["models"][label]["path"] = "models/Meta-Llama-3-8B"
        results["measurements"][label]["ruler"]["notes"] = []
        for each in results["scores"][label]:
            each["length"] = {2048: 4096, 6144: 65536}.get(each["length"], each["length"])
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    text = part(write_report([run]).read_text(), "ruler")
    assert "another model" not in text
    assert "lengths of 4K and 64K tokens instead of 4K, 8K, 16K, 32K and 64K" in text


def test_report_says_what_longbench_lacks(one, results):
    text = part(one[0], "longbench")
    for label in ("baseline", "extended"):
        for mean in ("mean_16", "mean_21", "few_shot"):
            assert f"{100 * score(results, label, 'longbench', mean, 0)['score']:.1f}*" in text
    assert "Not the published LongBench" in text
    assert "not the published ones: " in text
    assert "fewer questions than published in 21 of the tasks" in text
    assert "38.30" in text


def test_report_has_short_text_before_and_after_with_intervals(one, results):
    text = part(one[0], "short")
    for label in ("baseline", "extended"):
        for task in ("mmlu", "gsm8k", "hellaswag"):
            found = score(results, label, "short", task, 0)
            low, high = (f"{100 * bound:.1f}" for bound in found["interval"])
            assert f"{100 * found['score']:.1f}" in text
            assert f"{low}–{high}" in text
    assert "a mean without humaneval" in text
    assert "after supervised fine-tuning" in text


def test_report_marks_differences_that_are_larger_than_the_noise(one, results):
    page, text = one
    beyond = sum(each["beyond_noise"] for each in results["comparisons"])
    assert f"extended minus before: {beyond} of {len(results['comparisons'])} differences are larger" in text
    assert 'class="mark better"' in page
    assert 'class="mark worse"' in page
    compared = {(c["suite"], c["task"], c["length"]): c for c in results["comparisons"] if c["metric"] != "recall"}
    lost = compared["perplexity", "by_length", reports.LENGTHS[0]]
    assert lost["beyond_noise"]
    assert lost["difference"] > 0  # the loss rose, so it is worse
    value = f"{results['measurements']['extended']['perplexity']['by_length'][0]['perplexity']:.1f}"
    assert f"{value} ▼" in text


def test_report_lists_only_suites_that_were_not_run_as_missing(one, measured, results, tmp_path):
    assert "Not run:" not in part(one[0], "limits")
    assert f"Real inputs between {reports.LENGTHS[-1]:,} and {reports.TARGET:,} tokens" in part(one[0], "limits")
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    for label in ("baseline", "extended"):
        for suite in ("longbench", "short"):
            del results["measurements"][label][suite]
    results["left_out"] = {"short": "needs lm-eval <here>"}
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    text = part(write_report([run]).read_text(), "limits")
    assert "Not run: questions about and summaries of real documents (LongBench); what the extension costs" in text
    assert "(RULER)" not in text
    assert "Asked for and left out: short (needs lm-eval <here>)." in text


def test_report_forbids_every_request(one):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in one[0]
    assert "http://" not in one[0].replace("http://www.w3.org/", "")
    assert "https://" not in one[0]


def test_report_of_several_runs_keeps_other_inputs_apart(measured, tmp_path, results):
    made, runs = measured / "made", []
    for name, rope in (("linear", "linear"), ("yarn", "yarn")):
        runs.append(reports.trained(tmp_path / name, made, rope=rope))
        shutil.copytree(measured / "run" / "evaluation", runs[-1] / "evaluation")
    results["settings"]["seed"] = 5
    (runs[1] / "evaluation" / "results.json").write_text(json.dumps(results))
    control = reports.trained(tmp_path / "plain", made, "short")
    shutil.copytree(measured / "run" / "evaluation", control / "evaluation")
    path = write_report(runs, control)
    assert path == tmp_path / "report.html"
    page = path.read_text()
    text = checked(page)
    assert "2 runs side by side" in text
    assert "Left out: yarn measured other inputs than linear (seed)." in text
    assert "linear minus before" in text
    # The same model twice differs by nothing, whichever way one looks.
    assert "linear minus control: 0 of" in text
    head = part(page, "results")
    assert head.index("before") < head.index("control") < head.index("linear") < head.index("yarn")
    table = page[page.index('<section id="results">') :]
    (row,) = [line for line in table.split("<tr>") if "Perplexity, 2,048 tokens<" in line]
    assert row.count('<td class="run2">–</td>') == 1
    assert "context.rope.type" in text
    shown = measured_models(read_runs(runs, control))
    assert [model.key for model in shown.models] == ["baseline", "control", "extended", "run2"]


def test_report_of_an_evaluation_alone(measured, tmp_path):
    alone = tmp_path / "measured-alone"
    shutil.copytree(measured / "run" / "evaluation", alone)
    text = checked(write_report([alone]).read_text())
    assert "measured-alone" in text
    assert "An evaluation alone" in text
    assert read_run(measured / "run" / "evaluation").name == "run"


def test_report_tool_refuses_wrong_input_in_one_line(measured, tmp_path):
    run = measured / "run"
    small.assert_one_line_error(small.run_tool("report", run, run), "is named twice")
    small.assert_one_line_error(small.run_tool("report", run, "--out", tmp_path), f"--out {tmp_path}: is a directory")
    many = [tmp_path / str(number) for number in range(7)]
    small.assert_one_line_error(small.run_tool("report", *many), "7 runs are too many for one page; name 6 at most")
    (tmp_path / "neither").mkdir()
    small.assert_one_line_error(small.run_tool("report", run, tmp_path / "neither"), "nor results.json")
    assert not list(tmp_path.glob("*.html"))


def test_report_cost_includes_steps_that_were_not_logged(measured, tmp_path):
    run = reports.trained(tmp_path / "run", measured / "made")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "loss" not in line or line["step"] % 5 == 0]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    spent = cost.spent(read_run(run))
    assert spent.seconds == pytest.approx(60 * 16384 / 3900)
    assert spent.process_seconds == pytest.approx(2 * spent.seconds)
    assert (spent.tokens, spent.processes, spent.gpus) == (60 * 16384, 2, False)


def test_report_plan_is_that_of_tools_plan(tmp_path):
    recipe = load_recipe(small.ROOT / "recipes" / "llama3_8b_64k.yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.as_yaml())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "processes": 8, "step_time_s": 1.0}\n')
    run = read_run(tmp_path)
    found = cost.planned(run, cost.spent(run)).estimate
    plan = make_plan(recipe, "", *shape_for(recipe.model.hf, "")[:1], of_kind("h100"), 8)
    assert found.as_dict() == plan.estimate.as_dict()


def test_report_coverage_weights_the_prompts_of_every_source(measured, tmp_path):
    run = reports.trained(tmp_path / "run", measured / "made")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["train"] = {"a": 3.0, "b": {"weight": 1.0, "prompts": ["EP_2"]}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = distance_coverage.distance_coverage(read_run(run))
    assert len(found.prompts) == 2
    one, long = found.prompts
    assert one == 1  # EP_2 is a single token
    expected = sum(
        share * distance_counts(position_ids("end_prompt", 4096 - b, b, 32768), 32768)
        for share, b in ((0.25, one), (0.75, long))
    )
    np.testing.assert_allclose(found.counts, expected)
    # Of the two gaps, the part that neither prompt reaches.
    assert found.gap == (4096 - one, 32768 - 4096)


def test_report_smoothness_uses_the_frequencies_of_the_recipe(measured, one):
    before, after, attention = distance_coverage.smoothness(read_run(measured / "run"))
    expected = 10000.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(before.frequencies, expected, rtol=1e-6)
    np.testing.assert_allclose(after.frequencies, expected / 8, rtol=1e-6)
    assert attention == 1
    text = part(one[0], "distances")
    assert f"{8 * math.pi:.1f}" in text  # tokens of the fastest swing
    assert "Over the whole gap it says nothing" in text


def test_difference_of_two_intervals_equals_newcombe_method_10():
    # Newcombe (1998), table II, 56/70 against 48/80, method 10.
    from endprompt_megatron.evaluate.intervals import wilson

    first, second = (
        {"score": right / of, "interval": list(wilson(right, of)), "samples": of} for right, of in ((48, 80), (56, 70))
    )
    found = compare_intervals(first, second)
    assert found["difference"] == pytest.approx(0.2)
    assert found["interval"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    assert found["beyond_noise"]
    assert compare_intervals(first | {"interval": None}, second) is None


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_page_colours_have_enough_contrast(colours):
    for text in ("ink", "muted", "extended", "better", "worse"):
        assert contrast(colours[text], colours["paper"]) >= 4.5, text
    for line in ("baseline", "extended", "control", "untrained", *(f"run{number}" for number in range(2, 7))):
        assert contrast(colours[line], colours["paper"]) >= 3, line
    for background in ("wash", "heat"):  # the ends of the heat maps' scale
        assert contrast(colours["ink"], colours[background]) >= 4.5, background


def contrast(one, other):
    """WCAG 2's contrast ratio."""

    def luminance(colour):
        values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
