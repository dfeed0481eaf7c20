"""tools/dry_run.py: the real step at a rank of a cluster that is not there, beside the plan and counts by hand."""

import functools
import json
from collections import Counter

import pytest
from small import ROOT, assert_one_line_error, run_tool

PLAIN = ["parallel.overlap_tensor=false"]
# What the host may read of the device in a step: the states of random numbers, and the losses that are reported.
READ = {"megatron/core/tensor_parallel/random.py", "training/step.py", "model/loss.py"}


# hidden, ffn, queries, keys, tensor parallel, tokens of a rank, vocabulary
SIZES = {
    "llama3_8b_64k": (4096, 14336, 4096, 1024, 2, 8192, 128256),
    "llama3_8b_64k_full": (4096, 14336, 4096, 1024, 4, 32768, 128256),
    "llama3_70b_64k": (8192, 28672, 8192, 1024, 4, 4096, 128256),
    "llama31_405b_256k": (16384, 53248, 16384, 1024, 8, 4096, 128256),
}
SHORT = ("405b-first",)  # the others under --all
LAST = ("last", "8b", "8b-full-length")  # ranks that have the output layer


@functools.cache
def dry(recipe: str, nodes: int, rank: int, *options: object) -> dict:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    done = run_tool("dry_run", path, "--nodes", nodes, "--rank", rank, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def counts(step: dict, group: str) -> dict[str, int]:
    return {each["operation"]: each["count"] for each in step["traffic"] if each["group"].startswith(group)}


RANKS = {  # recipe, nodes, rank
    "70b-first": ("llama3_70b_64k", 8, 0),
    "70b-middle": ("llama3_70b_64k", 8, 20),
    "70b-last": ("llama3_70b_64k", 8, 63),
    "405b-first": ("llama31_405b_256k", 64, 0),
    "405b-last": ("llama31_405b_256k", 64, 511),
    "8b": ("llama3_8b_64k", 1, 0),
    "8b-full-length": ("llama3_8b_64k_full", 1, 0),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in SHORT else pytest.mark.full) for c in RANKS])
def test_a_step_holds_what_is_planned_and_sends_what_the_layout_says(case):
    recipe, nodes, rank = RANKS[case]
    count = {"llama31_405b_256k": 8, "llama3_8b_64k_full": 2}.get(recipe, 4)
    step = dry(recipe, nodes, rank, "--micro-batches", count, *PLAIN)
    planned, layers = step["planned"], sum(step["layers"])
    assert step["parameters"] == planned["parameters"]
    assert step["peak"] / 2**30 == pytest.approx(planned["gib"]["allocated"], rel=0.03)
    hidden, ffn, queries, keys, tensor, tokens, vocab = SIZES[recipe]
    matrices = layers * (hidden * (2 * queries + 2 * keys) + 3 * hidden * ffn) + vocab * hidden * case.endswith(LAST)
    assert step["flops"] == 6 * tokens * count * matrices // tensor
    assert step["elsewhere"] == []
    assert max(size for _, size in step["memory"]) == step["peak"]
    assert {each["line"].rpartition(":")[0] for each in step["syncs"]} <= READ
    # Each bucket is reduced once and gathered once, whatever the number of micro-batches.
    data = counts(step, "data and context")
    assert data["reduce_scatter_tensor_coalesced"] == data["allgather_into_tensor_coalesced"] == step["buckets"]
    # Sequence parallelism: two gathers a layer and forward, four backward, two and two of the other way.
    tensor = counts(step, "tensor")
    assert 0 <= tensor["allgather_base"] - 6 * layers * count <= 4 * count
    assert 0 <= tensor["reduce_scatter_base"] - 4 * layers * count <= 4 * count


@pytest.mark.full
@pytest.mark.parametrize("stage", range(4))
def test_what_a_stage_sends_is_what_the_next_receives(stage):
    """Of 70B's four stages with five virtual ones each: the last sends to the first."""
    following = (stage + 1) % 4
    ours, theirs = (dry("llama3_70b_64k", 8, 16 * each, "--micro-batches", 4, *PLAIN) for each in (stage, following))
    sent = counts(ours, "pipeline"), counts(theirs, "pipeline")
    for forward, back in ((stage, following), (following, stage)):
        mine, other = sent if forward == stage else sent[::-1]
        assert mine[f"send to {back}"] == other[f"recv from {forward}"] > 0
    sizes = [Counter({t["operation"]: t["bytes"] for t in each["traffic"]}) for each in (ours, theirs)]
    assert sizes[0][f"send to {following}"] == sizes[1][f"recv from {stage}"]


def test_its_page_shows_memory_traffic_and_waits():
    from endprompt_megatron.dry_run.dry_run_picture import html
    from endprompt_megatron.dry_run.rank_step import Step
    from endprompt_megatron.dry_run.target import target_of

    target = target_of(str(ROOT / "recipes/llama3_8b_64k.yaml"), PLAIN, 8, 4)
    step = Step(
        **{"rank": 3, "world_size": 8, "stage": 0, "layers": [32], "parameters": 4_015_263_744, "buckets": 2},
        **{"micro_batches": 4, "built": 2**34, "backward_peak": 2**35, "state": 2**33, "peak": 2**35 + 2**33},
        **{"flops": 10**15, "traffic": {("send to 1", "pipeline[4]"): (20, 2**30)}, "elsewhere": [], "seconds": 1.0},
        syncs=Counter({("item", "model/loss.py:58"): 4}),
        memory=[(0.0, 2**34), (0.5, 2**35), (1.0, 2**34)],
    )
    page = html(step, target)
    for said in ("rank 3 of 8", "40.000 GiB", "send to 1", "model/loss.py:58", "planned peak", "4,015,263,744"):
        assert said in page


def test_wrong_input_is_said_in_one_line():
    recipe = ROOT / "recipes/llama3_8b_64k.yaml"
    for given, said in (
        (["--rank", 8], ["--rank 8", "0 to 7"]),
        (["--nodes", 0], ["--nodes 0"]),
        (["--html", "nowhere/page.html"], ["--html nowhere/page.html", "not a directory"]),
        (["precision.fp8=hybrid"], ["precision.fp8=null"]),
        (["parallel.overlap_tensor=true"], ["parallel.overlap_tensor=false"]),
        (["model.hf=nowhere"], ["model.hf=nowhere"]),
    ):
        assert_one_line_error(run_tool("dry_run", recipe, *given), *said)
