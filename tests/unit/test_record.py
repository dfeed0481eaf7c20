"""metrics.jsonl: a resumed run continues where its checkpoint stands, and JSON stays JSON."""

import json
import math

import pytest

from endprompt_megatron.checkpoint.run_state import Progress
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.training.metrics import Recorder, cut_metrics
from endprompt_megatron.training.step import Losses


@pytest.fixture
def recorder(tmp_path, ground, monkeypatch):
    """Recorder of a run of 10 steps that stands at `step`."""
    monkeypatch.chdir(ground)
    recipe = load_recipe("recipe.yaml", [f"checkpoint.dir={tmp_path}/run", "train.log_interval=2"])

    def make(step: int = 0) -> Recorder:
        return Recorder(recipe, read_shape("hf"), Progress(step, 8 * step))

    return make


def strict(text: str) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_metrics_after_the_checkpoint_and_an_incomplete_line_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    lines.insert(2, {"step": 2, "valid_loss": 2.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "lo')
    cut_metrics(path, 2)
    assert strict(path.read_text()) == lines[:3]
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize("end", ["7", '"step"', "[1]", '{"step": "x"}', '{"step": null}', "\0\0\0\0"])
def test_metrics_line_that_is_not_a_record_is_removed(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + end)
    cut_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_cutting_missing_metrics_does_nothing(tmp_path):
    cut_metrics(tmp_path / "metrics.jsonl", 5)
    assert not list(tmp_path.iterdir())


def test_a_step_is_logged_as_one_object_with_the_documented_keys(recorder, tmp_path, capsys):
    with recorder() as record:
        record.stepped(Progress(2, 16), Losses(2.5, 3.0, 1.5), 0.7, 1e-5, seconds=4.0, skipped=False)
    (line,) = strict((tmp_path / "run/metrics.jsonl").read_text())
    assert set(line) >= {
        *("step", "consumed_samples", "consumed_tokens", "loss", "loss_context", "loss_prompt", "grad_norm", "lr"),
        *("step_time_s", "tokens_per_s", "tflops_per_gpu", "mfu", "memory_gib", "processes"),
    }
    assert (line["step"], line["consumed_samples"], line["consumed_tokens"]) == (2, 16, 16 * 64)
    assert (line["loss"], line["loss_context"], line["loss_prompt"]) == (2.5, 3.0, 1.5)
    assert line["tokens_per_s"] == 8 * 64 / 4.0
    assert "step 2/10  loss 2.5000 (context 3.0000, prompt 1.5000)" in capsys.readouterr().out


def test_values_that_are_not_finite_are_logged_as_null(recorder, tmp_path):
    with recorder() as record:
        record.stepped(Progress(1, 8), Losses(math.nan, math.inf, None), -math.inf, 1e-5, seconds=1.0, skipped=True)
        record.validated(1, {"valid_loss": math.nan, "virtual": {"128": {"loss": math.inf, "accuracy": 0.5}}})
    step, valid = strict((tmp_path / "run/metrics.jsonl").read_text())
    assert step["loss"] is step["loss_context"] is step["loss_prompt"] is step["grad_norm"] is None
    assert step["skipped_steps"] == 1
    assert valid == {"step": 1, "valid_loss": None, "virtual": {"128": {"loss": None, "accuracy": 0.5}}}


def test_progress_lines_appear_each_interval_at_the_last_step_and_for_skipped_ones(recorder, tmp_path):
    with recorder() as record:
        for step in range(1, 11):
            record.stepped(Progress(step, 8 * step), Losses(1.0, 1.0, None), 1.0, 1e-5, 1.0, skipped=step == 5)
    lines = strict((tmp_path / "run/metrics.jsonl").read_text())
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10]


def test_a_resumed_run_continues_its_metrics_file(recorder, tmp_path):
    with recorder() as record:
        for step in (2, 4, 6):
            record.stepped(Progress(step, 8 * step), Losses(1.0, 1.0, None), 1.0, 1e-5, 1.0, skipped=False)
    with recorder(step=4) as record:
        record.stepped(Progress(6, 48), Losses(2.0, 2.0, None), 1.0, 1e-5, 1.0, skipped=False)
    lines = strict((tmp_path / "run/metrics.jsonl").read_text())
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.0), (4, 1.0), (6, 2.0)]
