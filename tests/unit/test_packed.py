"""Rows of packed documents against a plain reconstruction; ranks, shares, blends, caches, refusals."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import PATIENCE, ROOT
from unit.building import build
from unit.test_data import PROMPTS, settings, write_dataset
from unit.test_packing import LENGTHS

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.samples.batches import KEYS, MicroBatches, join_rows
from endprompt_megatron.data.samples.dataset import consumed
from endprompt_megatron.data.samples.packed import context_tokens
from endprompt_megatron.method.positions import MAPS, copies, position_ids
from endprompt_megatron.model.context_parallel import zigzag_indices

METHODS = [name for name, position_map in MAPS.items() if not position_map.whole_window]
KNOBS = {"anchors": 2, "curriculum_samples": 30}


@pytest.fixture
def prefix(tmp_path) -> Path:
    write_dataset(tmp_path / "corpus", LENGTHS)
    return tmp_path / "corpus"


def train_set(prefix: Path, **changes):
    return build(**settings(prefix, **{"packing": "documents", "physical_len": 32, **changes}))[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("several", "align"), [(False, 1), (True, 1), (True, 4)])
def test_packed_rows_equal_a_plain_reconstruction(tmp_path, method, several, align):
    documents = write_dataset(tmp_path / "corpus", LENGTHS)
    prompts = PROMPTS if several else PROMPTS[:1]
    if method == "end_prompt_pose":
        prompts = [prompt for prompt in prompts if len(prompt) >= 2]
    used = [prompt * copies(method, anchors=2) for prompt in prompts] if MAPS[method].has_prompt else [[]]
    longest = 32 - max(map(len, used))
    dataset = train_set(tmp_path / "corpus", method=method, prompts=prompts, align=align, knobs=KNOBS)
    numbers = set()
    for index in range(len(dataset)):
        expected: dict[str, list] = {key: [] for key in KEYS}
        bounds = [0]
        for number, document, first, size, prompt in dataset.rows.samples(index):
            assert first % longest == 0
            assert number not in numbers
            numbers.add(number)
            context = documents[document][first : first + size]
            assert len(context) == size
            tokens = context + used[prompt]
            a, b = size, len(used[prompt])
            padding = [0] * (-(a + b) % align)
            expected["tokens"] += tokens + padding
            expected["labels"] += [*tokens[1:], 0, *padding]
            positions = position_ids(method, a, b, 192, index=number, seed=11, **KNOBS)
            expected["position_ids"] += positions.tolist() + padding
            expected["loss_weights"] += [1.0] * (a - 1) + [0.25] * b + [0.0] + [0.0] * len(padding)
            expected["prompt_mask"] += [False] * (a - 1) + [True] * b + [False] + [False] * len(padding)
            bounds.append(len(expected["tokens"]))
        rest = 32 - bounds[-1]
        row = dataset[index]
        assert set(row) == {*KEYS, "cu_seqlens"}
        assert row["cu_seqlens"].tolist() == bounds + ([32] if rest else [])
        for key in KEYS:
            assert row[key].tolist() == expected[key] + [0] * rest, (key, index)
    assert {row[key].dtype for key in ("tokens", "labels", "position_ids")} == {torch.int64}
    assert (row["loss_weights"].dtype, row["cu_seqlens"].dtype) == (torch.float32, torch.int32)


def test_an_epoch_of_packed_rows_reads_every_token_that_it_does_not_leave_out(prefix):
    epoch = train_set(prefix, method="short", train_samples=1).rows.counts.rows
    dataset = train_set(prefix, method="short", train_samples=epoch)
    seen = torch.cat([context_tokens(dataset[index]) for index in range(len(dataset))]).tolist()
    # Left out: documents of 1 token, and what is 1 token beyond whole pieces.
    ends = np.cumsum(LENGTHS).tolist()
    lost = [end - 1 for length, end in zip(LENGTHS, ends, strict=True) if length % 32 == 1]
    assert sorted(seen) == sorted(set(range(sum(LENGTHS))) - set(lost))
    counts = dataset.rows.counts
    assert (counts.left_out, counts.context_tokens) == (len(lost), len(seen))
    line = dataset.rows.describe("corpus")
    assert f"{len(lost)} tokens left out" in line
    assert f"{counts.rows} rows of 32 tokens" in line


def test_packing_efficiency_counts_the_real_tokens(prefix):
    epoch = train_set(prefix, prompts=PROMPTS, train_samples=1).rows.counts.rows
    dataset = train_set(prefix, prompts=PROMPTS, train_samples=epoch)
    rows = [dataset[index] for index in range(epoch)]
    predicted = sum(int((row["loss_weights"] > 0).sum()) for row in rows)
    real = predicted + dataset.rows.counts.samples  # of each sample one token has no target
    assert dataset.rows.counts.efficiency(32) == pytest.approx(real / (32 * len(rows)))


@pytest.mark.parametrize("least", [0, 20])
def test_what_a_packed_run_consumed_is_what_its_rows_hold(prefix, least):
    dataset = train_set(prefix, prompts=PROMPTS, train_samples=500, min_document_tokens=least)
    epoch = dataset.rows.counts.rows
    for rows in (0, 1, epoch, epoch + 3, 500):
        held = [dataset[index] for index in range(rows)]
        (source,) = consumed(dataset, rows)["sources"]
        context = sum(len(context_tokens(row)) for row in held)
        predicted = sum(int((row["loss_weights"] > 0).sum()) for row in held)
        samples = sum(len(dataset.excerpts(index)) for index in range(rows))
        assert (source["samples"], source["context_tokens"], source["packed_documents"]) == (rows, context, samples)
        assert context + source["prompt_tokens"] == predicted + samples
        assert source["epochs"] == pytest.approx(rows / epoch, rel=0.05)  # epochs differ by a row or two
    kept = [length for length in LENGTHS if length >= least]
    assert source["epoch_documents"] == len([length for length in kept if length > 0])
    assert source["left_out_tokens"] == sum(LENGTHS) - dataset.rows.counts.context_tokens


def test_excerpts_of_a_packed_row_are_where_their_tokens_are(prefix):
    dataset, ends = train_set(prefix, prompts=PROMPTS, train_samples=50, align=4), np.cumsum(LENGTHS)
    for index in range(50):
        tokens = dataset[index]["tokens"]
        for document, length, first, count, at in dataset.excerpts(index):
            begin = int(ends[document]) - length + first  # a token's id is its place
            assert tokens[at : at + count].tolist() == list(range(begin, begin + count))
            assert length == LENGTHS[document]


def rows_of(dataset, count: int) -> list:
    return [[dataset[index][key].tolist() for key in (*KEYS, "cu_seqlens")] for index in range(count)]


def test_a_longer_packed_run_begins_with_the_rows_of_a_shorter_one(prefix):
    short, long = train_set(prefix, train_samples=5), train_set(prefix, train_samples=200, prompts=PROMPTS[:1])
    assert (len(short), len(long)) == (5, 200)
    assert rows_of(short, 5) == rows_of(long, 5)
    epoch = long.rows.counts.rows
    assert rows_of(long, 2 * epoch)[:epoch] != rows_of(long, 2 * epoch)[epoch:]
    assert [long.epoch(row) for row in (0, epoch - 1, epoch)] == [0, 0, 1]


def test_any_number_of_ranks_reads_the_packed_rows_in_order(prefix):
    dataset = train_set(prefix, prompts=PROMPTS, train_samples=40)
    alone = MicroBatches(dataset, 4, 2, 0, 1)
    ranks = [MicroBatches(dataset, 4, 2, rank, 2) for rank in range(2)]
    resumed = [MicroBatches(dataset, 16, 2, rank, 4) for rank in range(4)]
    for step in range(6):
        expected, found = next(alone), next(ranks[step % 2])
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
    for rank in range(4):
        expected, found = next(alone), next(resumed[rank])
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_context_parallel_ranks_are_two_chunks_of_every_sequence(prefix, size):
    dataset = train_set(prefix, prompts=PROMPTS, align=2 * size)
    rows = [dataset[index] for index in range(3)]
    whole = join_rows(rows)
    assert whole["tokens"].shape == (1, 96)
    bounds = whole["cu_seqlens"].tolist()
    assert bounds[-1] == 96
    assert {32, 64} <= set(bounds)
    shares = [join_rows(rows, rank, size) for rank in range(size)]
    for key in KEYS:
        at = 0
        for start, stop in itertools.pairwise(bounds):
            chunk = (stop - start) // (2 * size)
            chunks: list = [None] * (2 * size)
            for rank, share in enumerate(shares):
                part = share[key][0, at : at + 2 * chunk]
                chunks[rank], chunks[2 * size - 1 - rank] = part[:chunk], part[chunk:]
            assert torch.equal(torch.cat(chunks), whole[key][0, start:stop]), key
            at += 2 * chunk
    assert all(torch.equal(share["cu_seqlens"], whole["cu_seqlens"]) for share in shares)
    with pytest.raises(ValueError, match="does not divide"):
        zigzag_indices([0, 8, 15], 0, 2)


def test_packed_rows_of_a_blend_and_of_a_split(tmp_path):
    for name, first in (("one", 0), ("two", 2000)):
        write_dataset(tmp_path / name, LENGTHS, first_token=first)
    blend = [(str(tmp_path / "one"), 1.0), (str(tmp_path / "two"), 3.0)]
    train = train_set(tmp_path / "one", train=blend, train_samples=80)
    assert sum(int(train[index]["tokens"][0]) >= 2000 for index in range(80)) == 60
    # Rows of a blend are those of its sources, in their order.
    alone = rows_of(train_set(tmp_path / "one", train_samples=20), 20)
    assert [row for row in rows_of(train, 80) if row[0][0] < 2000] == alone

    split = settings(tmp_path / "one", packing="documents", physical_len=32, valid="3,1", valid_samples=4)
    train, valid = build(**split)
    assert valid.rows.packing.row_len == 32
    border = sum(LENGTHS[: round(0.75 * len(LENGTHS))])
    assert max(int(context_tokens(train[index]).max()) for index in range(len(train))) < border
    assert min(int(context_tokens(valid[index]).min()) for index in range(len(valid))) >= border


def test_packed_epochs_are_cached_follow_the_data_and_are_repaired(prefix):
    cache = prefix.parent / "cache"
    first = rows_of(train_set(prefix), 10)
    files = {file.name: file.stat().st_mtime_ns for file in cache.glob("packed-*")}
    assert len(files) == 3
    assert rows_of(train_set(prefix, train_samples=12), 10) == first
    assert {file.name: file.stat().st_mtime_ns for file in cache.glob("packed-*")} == files
    for name in ("samples.npy", "starts.npy", "json"):
        for size in (0, -9):
            [file] = cache.glob(f"packed-*.{name}")
            file.write_bytes(file.read_bytes()[:size])
            assert rows_of(train_set(prefix), 10) == first
    assert not list(cache.glob(".*"))
    write_dataset(prefix, LENGTHS[::-1])  # another corpus under the old name
    assert rows_of(train_set(prefix), 10) != first


RANK = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
sys.path += [sys.argv[3], sys.argv[3] + "/.."]
from unit.test_packed import rows_of, two_sources
store = f"file://{sys.argv[1]}/store"
torch.distributed.init_process_group("gloo", init_method=store, rank=int(sys.argv[2]), world_size=2)
import hashlib, json
for dataset in two_sources(sys.argv[1], sys.argv[1] + "/cache"):
    print(hashlib.sha256(json.dumps(rows_of(dataset, 6)).encode()).hexdigest())
torch.distributed.destroy_process_group()
"""


def two_sources(directory, cache) -> tuple:
    blend = [(f"{directory}/one", 1.0), (f"{directory}/two", 2.0)]
    changes = dict(train=blend, valid=blend[:1], valid_samples=6, prompts=PROMPTS, method="end_prompt_random")
    return build(**settings(Path(directory) / "one", packing="documents", physical_len=32, cache_dir=cache, **changes))


def test_two_ranks_and_no_ranks_read_the_same_rows(tmp_path):
    import hashlib

    for name, first in (("one", 0), ("two", 2000)):
        write_dataset(tmp_path / name, LENGTHS, first_token=first)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(rank), str(ROOT / "tests" / "unit")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    expected = [
        hashlib.sha256(json.dumps(rows_of(dataset, 6)).encode()).hexdigest()
        for dataset in two_sources(tmp_path, tmp_path / "other")
    ]
    assert [result[0].split() for result in results] == [expected, expected]


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"physical_len": 6}, ["context.physical=6 leaves 1 tokens", "needs 2"]),
        ({"align": 5}, ["data.align=5", "not a multiple of 5"]),
        ({"method": "full", "physical_len": 192}, ["context.method=full with data.packing=documents", "short"]),
        ({"vocab_size": 1400}, ["context.prompts: token id 1504"]),
        ({"valid": "999,1", "valid_samples": 2}, ["for validation are shorter than one sample"]),
    ],
)
def test_impossible_settings_of_packing_are_refused(prefix, changes, needles):
    with pytest.raises(InputError) as refused:
        train_set(prefix, **changes)
    for needle in needles:
        assert needle in str(refused.value)
    assert "\n" not in str(refused.value)


def test_packing_documents_that_are_all_too_short_is_refused(tmp_path):
    write_dataset(tmp_path / "corpus", (1,) * 100)
    with pytest.raises(InputError, match=r"data.train=.*100 documents with 100 tokens are shorter than one sample"):
        train_set(tmp_path / "corpus")


def test_a_packed_token_outside_the_vocabulary_is_refused(prefix):
    dataset = train_set(prefix, method="short", vocab_size=sum(LENGTHS) - 5)
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        rows_of(dataset, len(dataset))


def test_transformer_engine_is_given_flat_rows_and_their_bounds():
    """What wraps its core attention: rows [t, 1, h, d] outside, [t, h, d] in the form thd inside."""
    from endprompt_megatron.model.packed_sequences import packed_attention, packed_sequences

    class Engine(torch.nn.Module):
        def forward(self, query, key, value, mask, packed_seq_params=None):
            if packed_seq_params is None:
                return query.flatten(2)
            p = packed_seq_params
            assert type(p).__name__ == "PackedSeqParams"
            assert (p.qkv_format, p.max_seqlen_q, p.max_seqlen_kv) == ("thd", 8, 8)
            assert p.cu_seqlens_q is p.cu_seqlens_kv
            assert p.cu_seqlens_q_padded is p.cu_seqlens_kv_padded
            assert key.shape == value.shape == (len(query), 2, 8)
            sums = [query[a:b].cumsum(0) for a, b in zip(p.cu_seqlens_q[:-1], p.cu_seqlens_q[1:], strict=True)]
            return torch.cat(sums).flatten(1)

    query, key = torch.rand(16, 1, 4, 8), torch.rand(16, 1, 2, 8)
    attention = packed_attention(Engine)()
    assert torch.equal(attention(query, key, key, None), query.flatten(2))
    bounds = torch.tensor([0, 3, 9, 16], dtype=torch.int32)
    sequences = packed_sequences(bounds, torch.zeros(1, 16))
    assert sequences.cu_seqlens_q_padded is None
    assert sequences.qkv_format != "thd", "Megatron would take the row apart and restart its positions"
    found = attention(query, key, key, None, packed_seq_params=sequences)
    parts = [query[:3].cumsum(0), query[3:9].cumsum(0), query[9:].cumsum(0)]
    assert torch.equal(found, torch.cat(parts).flatten(2))
    shared = packed_sequences(bounds, torch.zeros(1, 8))  # half of it, as one of two ranks has it
    assert shared.cu_seqlens_q_padded is shared.cu_seqlens_q
