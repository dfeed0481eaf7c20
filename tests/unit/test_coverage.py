"""Coverage of a recipe: exact for fixed maps, an average for random ones; the table, the JSON and the picture."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from small import assert_one_line_error, run_tool, small_llama

from endprompt_megatron.coverage import coverage, table
from endprompt_megatron.positions import position_ids


def test_end_prompt_coverage_is_exact():
    result = coverage("end_prompt", 8192, 65536, [11])
    assert result.supervised == [(0, 8180), (57345, 65535)]
    assert result.gaps == [(8181, 57344)]
    assert result.share == (8181 + 8191) / 65536
    assert result.counts.sum() == 8192 * 8193 / 2
    # Inside the second range every prompt token meets one context token at each distance, but at the edges.
    assert set(result.counts[57355:65526]) == {11.0}


def test_prompts_of_a_set_count_equally():
    both = coverage("end_prompt", 64, 512, [4, 10])
    apart = [coverage("end_prompt", 64, 512, [length]).counts for length in (4, 10)]
    np.testing.assert_allclose(both.counts, (apart[0] + apart[1]) / 2)
    assert both.segments == [(60, 4), (54, 10)]


@pytest.mark.parametrize("method", ["end_prompt_random", "end_prompt_pose", "pose"])
def test_random_methods_are_the_mean_of_their_samples(method):
    b = 0 if method == "pose" else 8
    result = coverage(method, 40, 128, [8], samples=50, seed=3, chunks=2)
    expected = np.zeros(128)
    for index in range(50):
        positions = position_ids(method, 40 - b, b, 128, index=index, seed=3, chunks=2)
        distances = np.subtract.outer(positions, positions)[np.tril_indices(40)]
        expected += np.bincount(distances, minlength=128)
    np.testing.assert_allclose(result.counts, expected / 50)
    assert result.share > coverage("end_prompt", 40, 128, [8]).share


def test_controls():
    assert coverage("full", 64, 64, []).gaps == []
    assert coverage("short", 16, 64, []).supervised == [(0, 15)]
    assert "gap         [16, 63]" in table(coverage("short", 16, 64, []))


def test_bands_hold_everything_once():
    result = coverage("end_prompt_pose", 100, 1000, [12], samples=20)
    bands = result.bands()
    assert sum(band["pairs"] for band in bands) == pytest.approx(100 * 101 / 2)
    assert (bands[0]["first"], bands[-1]["last"]) == (0, 999)
    assert all(before["last"] + 1 == after["first"] for before, after in itertools.pairwise(bands))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    small_llama(directory / "model")
    path = directory / "recipe.yaml"
    path.write_text(
        f"model: {{hf: {directory / 'model'}}}\n"
        "context: {method: end_prompt, original: 64, target: 512, physical: 64, prompts: [EP_2]}\n"
        "train: {steps: 1}\n"
        f"checkpoint: {{dir: {directory / 'run'}}}\n"
    )
    return path


def test_the_tool_prints_and_draws(recipe, tmp_path):
    result = run_tool("coverage", recipe, "--out", tmp_path / "picture.png")
    assert result.returncode == 0, result.stderr
    assert "[0, 62], [449, 511]" in result.stdout  # a = 63, b = 1: EP_2 is one token
    assert "gap         [63, 448]" in result.stdout
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_tool_takes_overrides_and_gives_json(recipe):
    result = run_tool("coverage", recipe, "context.method=short", "context.target=256", "--json")
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert (value["method"], value["target"], value["supervised"]) == ("short", 256, [[0, 63]])


def test_bad_input_is_one_line(recipe, tmp_path):
    assert_one_line_error(run_tool("coverage", tmp_path / "no.yaml"), "no.yaml")
    assert_one_line_error(run_tool("coverage", recipe, "context.method=nosuch"), "context.method=nosuch")
    refused = run_tool("coverage", recipe, "context.method=end_prompt_pose")
    assert_one_line_error(refused, "1 tokens cannot be split into 2 chunks")
    assert_one_line_error(run_tool("coverage", recipe, "context.prompts=[EP_7]"), "context.prompts=EP_7")
    assert_one_line_error(run_tool("coverage", recipe, "--out", tmp_path / "no" / "x.png"), "--out")
    assert_one_line_error(run_tool("coverage", recipe, f"model.hf={tmp_path}"), "holds no tokenizer", "--prompt-length")
    assert_one_line_error(run_tool("coverage", recipe, "--prompt-length", 64), "leaves no context")
