"""Preflight over several ranks and nodes: what only shows between them is measured, and who differs is named."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from parallel.preflighting import check
from parallel.ranks import Ranks
from small import PATIENCE, ROOT, small_llama
from unit.starting import RECIPE, write_tokens

from endprompt_megatron.convert.to_megatron import convert_hf_to_megatron


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("preflight")
    small_llama(root / "hf")
    convert_hf_to_megatron(root / "hf", root / "megatron")
    write_tokens(root / "train", 4000)
    (root / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def over(ranks, ground):
    """Run over `world` ranks, `per_node` a node: the code that all agree on, and rank 0's findings."""

    def run(world, per_node=1, faults=None, timeout=600.0, overrides=()):
        answers = ranks.run(world, check, str(ground), per_node, faults or {}, timeout, list(overrides))
        codes = {code for code, _, _ in answers}
        assert len(codes) == 1, answers
        assert not any(found for _, found, _ in answers[1:]), "only rank 0 speaks"
        assert sorted(ground.glob(".preflight*")) == []
        assert not (ground / "run").exists()
        return codes.pop(), answers[0][1]

    return run


@pytest.mark.parametrize(("world", "per_node"), [(2, 1), (4, 2), (4, 4)])
def test_identical_nodes_are_ready(over, world, per_node):
    code, found = over(world, per_node)
    assert code == 0, found
    nodes = world // per_node
    assert found["processes"][1] == f"{world} processes on {nodes} node{'s' * (nodes > 1)}"
    verdict, said = found["all-reduce"]
    assert verdict == "ok"
    assert said.startswith(f"{world} ranks, gloo, 16 MiB in ")
    assert "sum correct" in said
    assert float(said.partition("bus bandwidth ")[2].split()[0]) > 0
    expected = {"shared file system": f"{nodes} nodes see each other's files", "inputs on all nodes": f"{nodes} nodes"}
    for name, text in expected.items():
        if nodes > 1:
            assert found[name][0] == "ok"
            assert text in found[name][1]
    assert found["clock skew"][0] == ("ok" if nodes > 1 else "-")


def test_a_run_directory_that_is_not_shared_fails(over, ground, tmp_path):
    """The third node works in a copy: the same inputs, but what it writes no one sees."""
    shutil.copytree(ground, tmp_path / "own")
    code, found = over(4, 1, {2: ["directory", str(tmp_path / "own")]})
    assert code == 2
    verdict, said = found["shared file system"]
    assert verdict == "FAIL"
    for line in ("n3 does not see what any other node wrote", "n1 does not see what n3 wrote"):
        assert line in said, said
    assert found["run directory"][0] == "ok"
    assert found["inputs on all nodes"][0] == "ok"
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == sorted(p.name for p in ground.iterdir())


def test_inputs_that_a_node_lacks_are_named(over, ground, tmp_path):
    shutil.copytree(ground, tmp_path / "own")
    (tmp_path / "own/train.bin").unlink()
    code, found = over(2, 1, {1: ["directory", str(tmp_path / "own")]})
    assert code == 2
    assert found["inputs on all nodes"][0] == "FAIL"
    assert "data.train=train.bin: 8000 bytes on n1, missing on n2" in found["inputs on all nodes"][1]


def test_a_different_recipe_on_a_node_fails(over, ground, tmp_path):
    shutil.copytree(ground, tmp_path / "own")
    (tmp_path / "own/recipe.yaml").write_text(RECIPE.replace("steps: 10", "steps: 11"))
    code, found = over(2, 1, {1: ["directory", str(tmp_path / "own")]})
    assert code == 2
    assert "nodes read different recipes" in found["same recipe"][1]


def test_a_node_without_the_recipe_is_named_and_does_not_delay_the_others(over, tmp_path):
    code, found = over(2, 1, {1: ["directory", str(tmp_path)]})
    assert code == 2
    assert found["processes"][0] == "FAIL"
    assert "1 of 2 processes take part: n2: recipe.yaml: no such recipe" in found["processes"][1]
    assert found["all-reduce"][0] == "-"
    assert found["data.train"][0] == "ok"


@pytest.mark.parametrize(("skew", "words"), [(5.0, "n2 5.0 s ahead"), (-2.5, "n2 2.5 s behind")])
def test_clock_skew_is_a_warning(over, skew, words):
    code, found = over(4, 1, {1: ["clock", skew]})
    assert code == 0
    assert found["clock skew"][0] == "warn"
    assert words in found["clock skew"][1]


def test_versions_that_differ_are_named_with_their_nodes(over):
    code, found = over(4, 1, {2: ["version", {"torch": "2.5.0", "driver": "550.54"}]})
    assert code == 2
    verdict, said = found["torch"]
    assert verdict == "FAIL"
    assert "on n1, n2, n4, 2.5.0 on n3; nodes differ" in said
    assert "2.6 or later is needed" in said
    assert found["driver"] == (
        "warn",
        "none on n1, n2, n4, 550.54 on n3; nodes differ: use the same container or environment on all of them",
    )


@pytest.mark.parametrize(
    ("versions", "check_name", "words"),
    [
        ({"Megatron-Core": "0.15.2"}, "Megatron-Core", "0.15.2; versions 0.16 to 0.19 are supported"),
        ({"Megatron-Core": "0.20.0rc1"}, "Megatron-Core", "versions 0.16 to 0.19 are supported"),
        ({"Megatron-Core": None}, "Megatron-Core", "none; install megatron-core 0.16 to 0.19"),
    ],
)
def test_versions_out_of_range_fail(over, versions, check_name, words):
    code, found = over(2, 2, {0: ["version", versions]})
    assert (code, found[check_name][0]) == (2, "FAIL")
    assert words in found[check_name][1]


def test_a_wrong_all_reduce_sum_names_the_rank(over):
    code, found = over(4, 2, {3: ["sum", 12345]})
    assert code == 2
    assert found["all-reduce"][0] == "FAIL"
    assert "wrong sum on rank 3 (n2)" in found["all-reduce"][1]


def test_an_unreachable_rank_fails_the_all_reduce_and_not_the_other_checks(ground):
    """In processes of its own: torch counts process groups, and here one rank makes one less than the other."""
    pool = Ranks(2)
    try:
        (code, found, _), _ = pool.run(2, check, str(ground), 1, {1: ["silent", 1.0]}, 5.0, [])
    finally:
        pool.close()
    assert code == 2
    verdict, said = found["all-reduce"]
    assert verdict == "FAIL"
    assert said.startswith("failed on rank 0, 1 (n1, n2): ")
    assert found["HF checkpoint"][0] == "ok"


H100 = "NVIDIA H100 80GB HBM3"


def gpu(number: int, name: str = H100, free: float = 78.0) -> dict:
    return {"visible": {f"uuid-{number}": [name, 79.6]}, "own": f"uuid-{number}", "free_gib": free}


# name: (facts of the four ranks on two nodes, verdict, expected text, check)
GPUS = {
    "one-each": ([gpu(0), gpu(1), gpu(2), gpu(3)], "ok", "2 x NVIDIA H100 80GB HBM3 80 GiB per node", "GPUs"),
    "too-few": ([gpu(0), gpu(0), gpu(2), gpu(3)], "FAIL", "n1 has 1 for 2 processes", "GPUs"),
    "a-node-without": (
        [gpu(0), gpu(1), *[{"visible": {}, "own": None, "free_gib": None}] * 2],
        "FAIL",
        "none on n2: n2 has 0 for 2 processes",
        "GPUs",
    ),
    "two-kinds": ([gpu(0), gpu(1), gpu(2, "H200"), gpu(3, "H200")], "warn", "2 x H200 80 GiB on n2", "GPUs"),
    "in-use": ([gpu(0), gpu(1), gpu(2), gpu(3, free=40.0)], "FAIL", "40 GiB on n2 (rank 3)", "GPU memory"),
}


@pytest.mark.parametrize("case", GPUS)
def test_gpus_must_be_one_per_process_of_one_kind_and_free(over, case):
    parts, verdict, words, name = GPUS[case]
    _, found = over(4, 2, {rank: ["gpus", part] for rank, part in enumerate(parts)})
    assert found[name][0] == verdict, found
    assert found["all-reduce"][0] == "ok"
    assert words in found[name][1], found[name]


@pytest.mark.full
def test_only_one_rank_prints_the_preflight_under_torchrun(ground):
    """The real launcher, whose own store the ranks meet in; two nodes by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    arguments = [ROOT / "tools/preflight.py", "recipe.yaml", "parallel.tensor=2", "--json", "--timeout", "600"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ground, capture_output=True, text=True, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)  # one object: the other rank was silent
    assert said["ready"]
    found = {check["check"]: check["found"] for check in said["checks"]}
    assert "legal on 2 processes (as started): TP 2" in found["recipe"]
    assert found["all-reduce"].startswith("2 ranks, gloo")
