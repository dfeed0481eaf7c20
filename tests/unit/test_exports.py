"""Hugging Face weights beside checkpoints (checkpoint.export_every): those of each step, whatever else is kept."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small import assert_one_line_error

from endprompt_megatron.checkpoint.layout import complete_iterations
from endprompt_megatron.convert.exports import pending
from endprompt_megatron.convert.to_hf import convert_megatron_to_hf

OVERRIDES = ["recipe.yaml", "train.steps=5", "checkpoint.interval=1", "checkpoint.export_every=2"]


def weights(directory: Path) -> dict:
    return load_file(directory / "model.safetensors")


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)


def test_exports_are_those_of_their_checkpoints_and_outlive_them(place, extend):
    done = extend(place, *OVERRIDES, "checkpoint.keep=1")
    assert done.returncode == 0, done.stderr
    exports = place / "run/exports"
    assert sorted(path.name for path in exports.iterdir() if path.is_dir()) == ["iter_0000002", "iter_0000004"]
    # The same run again, with everything kept, gives the same weights (a test of resumes holds that).
    shutil.move(place / "run", place / "first")
    done = extend(place, *OVERRIDES, "checkpoint.keep=0", "checkpoint.export_every=0")
    assert done.returncode == 0, done.stderr
    assert not (place / "run/exports").exists()
    for step in (2, 4):
        convert_megatron_to_hf(place / "run/checkpoints", place / f"at-{step}", step)
        assert_same(weights(place / f"first/exports/iter_{step:07d}"), weights(place / f"at-{step}"))
    config = json.loads((place / "first/exports/iter_0000004/config.json").read_text())
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}


@pytest.mark.full
def test_a_run_that_goes_on_makes_the_exports_that_lack(place, extend):
    assert extend(place, *OVERRIDES, "checkpoint.keep=0").returncode == 0
    expected = weights(place / "run/exports/iter_0000002")
    shutil.rmtree(place / "run/exports/iter_0000002")
    assert pending(place / "run/checkpoints", 2) == [2]
    assert "done already" in extend(place, *OVERRIDES, "checkpoint.keep=0").stdout
    assert_same(weights(place / "run/exports/iter_0000002"), expected)
    assert pending(place / "run/checkpoints", 2) == []
    assert complete_iterations(place / "run/checkpoints") == [1, 2, 3, 4, 5]


def test_an_export_that_fails_is_said_and_training_goes_on(place, extend):
    (place / "run/exports").mkdir(parents=True)
    (place / "run/exports/.iter_0000002.partial").write_text("in the way")
    done = extend(place, *OVERRIDES, "checkpoint.keep=0")
    assert done.returncode == 0, done.stderr
    assert "the export of step 2 failed: see run/exports/iter_0000002.log; training goes on" in done.stdout
    assert (place / "run/exports/iter_0000004/model.safetensors").is_file()


def test_exports_between_checkpoints_are_refused(place, extend):
    result = extend(place, "recipe.yaml", "checkpoint.interval=2", "checkpoint.export_every=3")
    assert_one_line_error(result, "checkpoint.export_every=3", "multiple of checkpoint.interval=2")
