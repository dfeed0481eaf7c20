"""Coverage of a recipe: exact for fixed maps, an average for random ones; the table, the JSON and the picture."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from small import assert_one_line_error, run_tool, small_llama

from endprompt_megatron.method.coverage import coverage, table
from endprompt_megatron.method.positions import position_ids
from endprompt_megatron.method.prompts import tokenise_prompts


def test_end_prompt_coverage_is_exact():
    result = coverage("end_prompt", 8192, 65536, [11])
    assert result.supervised == [(0, 8180), (57345, 65535)]
    assert result.gaps == [(8181, 57344)]
    assert result.share == (8181 + 8191) / 65536
    assert result.counts.sum() == 8192 * 8193 / 2
    # Inside the second range every prompt token meets one context token at each distance, but at the edges.
    assert set(result.counts[57355:65526]) == {11.0}


def test_coverage_counts_prompts_of_a_set_equally():
    both = coverage("end_prompt", 64, 512, [4, 10])
    apart = [coverage("end_prompt", 64, 512, [length]).counts for length in (4, 10)]
    np.testing.assert_allclose(both.counts, (apart[0] + apart[1]) / 2)
    assert both.segments == [(60, 4), (54, 10)]


def test_coverage_weighs_terminal_segments_weigh_their_counts():
    mixed = coverage("end_prompt", 64, 512, [4, 20], shares=[0.25, 0.75])
    apart = [coverage("end_prompt", 64, 512, [length]).counts for length in (4, 20)]
    np.testing.assert_allclose(mixed.counts, 0.25 * apart[0] + 0.75 * apart[1])
    assert mixed.prompt == 0.25 * 4 + 0.75 * 20


def test_coverage_of_a_curriculum_is_that_of_the_whole_run():
    result = coverage("end_prompt_curriculum", 64, 512, [4], samples=64, of=6400, curriculum_samples=6400)
    assert result.gaps == []  # 64 places of the prompt between 64 and 512, each of which covers 60 distances
    first = coverage("end_prompt_curriculum", 64, 512, [4], samples=64, of=64, curriculum_samples=6400)
    assert first.supervised == [(0, 64)]


def test_several_copies_of_the_prompt_leave_smaller_gaps_than_one():
    one = coverage("end_prompt", 8192, 65536, [11])
    several = coverage("end_prompt_multi", 8192, 65536, [44], anchors=4)
    assert several.segments == [(8148, 44)]
    assert several.share > 1.9 * one.share
    assert max(last - first for first, last in several.gaps) < 20_000 < 49_000 < one.gaps[0][1] - one.gaps[0][0]
    assert coverage("end_prompt_near", 8192, 65536, [11]).supervised == [(0, 8191)]


@pytest.mark.parametrize("method", ["end_prompt_random", "end_prompt_log", "end_prompt_pose", "pose"])
def test_coverage_of_random_methods_is_the_mean_of_their_samples(method):
    b = 0 if method == "pose" else 8
    result = coverage(method, 40, 128, [8], samples=50, seed=3, chunks=2)
    expected = np.zeros(128)
    for index in range(50):
        positions = position_ids(method, 40 - b, b, 128, index=index, seed=3, chunks=2)
        distances = np.subtract.outer(positions, positions)[np.tril_indices(40)]
        expected += np.bincount(distances, minlength=128)
    np.testing.assert_allclose(result.counts, expected / 50)
    assert result.share > coverage("end_prompt", 40, 128, [8]).share


def test_coverage_of_full_length_and_of_short_training():
    assert coverage("full", 64, 64, []).gaps == []
    assert coverage("short", 16, 64, []).supervised == [(0, 15)]
    assert "gap         [16, 63]" in table(coverage("short", 16, 64, []))


def test_coverage_bands_hold_every_pair_once():
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


def test_coverage_tool_prints_and_draws(recipe, tmp_path):
    result = run_tool("coverage", recipe, "--out", tmp_path / "picture.png")
    assert result.returncode == 0, result.stderr
    assert "[0, 62], [449, 511]" in result.stdout  # a = 63, b = 1: EP_2 is one token
    assert "gap         [63, 448]" in result.stdout
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_coverage_tool_takes_overrides_and_gives_json(recipe):
    result = run_tool("coverage", recipe, "context.method=short", "context.target=256", "--json")
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert (value["method"], value["target"], value["supervised"]) == ("short", 256, [[0, 63]])


def test_coverage_tool_knows_prompts_of_sources_and_recall(recipe, tmp_path):
    """Half of the samples recall, the others end with what their source has."""
    one = tmp_path / "own.yaml"
    one.write_text(
        f"inherit: {recipe}\ncontext: {{recall: {{cue: 'End.', tokens: 10, key: 2, share: 0.5}}}}\n"
        "data: {train: {first: 3, second: {weight: 1, prompts: ['text:End.End.End.', EP_2]}}}\n"
    )
    result = run_tool("coverage", one, "--json")
    assert result.returncode == 0, result.stderr
    found = {(part["context"], part["prompt"]): part["share"] for part in json.loads(result.stdout)["segments"]}
    prompts = tokenise_prompts(recipe.parent / "model", ["text:End.", "text:End.End.End.", "EP_2"])
    cue, own, eot = map(len, prompts)
    assert found == {(64 - eot, eot): 0.5 * 7 / 8, (64 - own, own): 0.5 / 8, (54 - cue, 10 + cue): 0.5}
    several = run_tool("coverage", one, "--json", "context.method=end_prompt_multi", "context.anchors=2")
    assert {part["prompt"] for part in json.loads(several.stdout)["segments"]} == {2 * eot, 2 * own, 2 * (10 + cue)}


def test_coverage_tool_refuses_bad_input_in_one_line(recipe, tmp_path):
    assert_one_line_error(run_tool("coverage", tmp_path / "no.yaml"), "no.yaml")
    assert_one_line_error(run_tool("coverage", recipe, "context.method=nosuch"), "context.method=nosuch")
    refused = run_tool("coverage", recipe, "context.method=end_prompt_pose")
    assert_one_line_error(refused, "1 tokens cannot be split into 2 chunks")
    assert_one_line_error(run_tool("coverage", recipe, "context.prompts=[EP_7]"), "context.prompts=EP_7")
    assert_one_line_error(run_tool("coverage", recipe, "--out", tmp_path / "no" / "x.png"), "--out")
    assert_one_line_error(run_tool("coverage", recipe, f"model.hf={tmp_path}"), "holds no tokenizer", "--prompt-length")
    assert_one_line_error(run_tool("coverage", recipe, "--prompt-length", 64), "leaves no context")
