"""Windows against Megatron's own index and against plain reconstructions; the order of a run, whoever reads it."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from unit.building import build
from unit.test_data import LENGTHS, PROMPTS, settings, train_set, write_dataset

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.indexed import read_idx
from endprompt_megatron.data.samples import windows as windows_module
from endprompt_megatron.data.samples.batches import KEYS, MicroBatches
from endprompt_megatron.data.samples.blend import sources_of, turns
from endprompt_megatron.data.samples.dataset import consumed
from endprompt_megatron.data.samples.windows import Windows, epoch_seed
from endprompt_megatron.method.positions import position_ids
from endprompt_megatron.method.random_streams import draws, generator

MANY = tuple(int(n) for n in np.random.default_rng(5).integers(0, 400, 300))


@pytest.fixture
def prefix(tmp_path) -> Path:
    write_dataset(tmp_path / "corpus")
    return tmp_path / "corpus"


def tokens_of(windows: Windows, stream: list[int], index: int) -> list[int]:
    return [token for start, stop in windows.spans(index) for token in stream[start:stop]]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_windows_of_an_epoch_are_those_of_megatrons_dataset_with_its_seed(tmp_path, epoch):
    """GPTDataset, built by megatron-core for one epoch, gives the same windows in the same order."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    write_dataset(tmp_path / "corpus", lengths=MANY, dtype=np.int32)

    class Identity:
        pad, eod, vocab_size, unique_identifiers = -1, -2, None, {}

    config = GPTDatasetConfig(
        random_seed=epoch_seed(11, epoch),
        sequence_length=37,
        blend=([str(tmp_path / "corpus")], None),
        split="1",
        path_to_cache=str(tmp_path / "megatron"),
        tokenizer=Identity(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
    )
    documents = np.arange(len(MANY), dtype=np.int32)
    theirs = GPTDataset(
        IndexedDataset(str(tmp_path / "corpus")), str(tmp_path / "corpus"), documents, 1, Split.train, config
    )
    ours = Windows(read_idx(tmp_path / "corpus"), 37, 11)
    assert ours.count == len(theirs) == sum(MANY) // 37
    for place in range(ours.count):
        expected, _ = theirs._query_document_sample_shuffle_indices(place)
        assert tokens_of(ours, list(range(sum(MANY))), epoch * ours.count + place) == expected.tolist()


@pytest.mark.parametrize("least", [0, 90])
def test_within_every_window_lies_inside_one_document(tmp_path, least):
    documents = write_dataset(tmp_path / "corpus", lengths=MANY)
    windows = Windows(read_idx(tmp_path / "corpus"), 37, 11, ends="within", min_len=least)
    kept = [document for document in documents if len(document) >= max(least, 37)]
    assert windows.documents == len(kept)
    assert windows.count == sum(len(document) // 37 for document in kept)
    assert windows.left_out == sum(MANY) - 37 * windows.count
    drawn = set()
    for epoch in range(3):
        found = {}
        for place in range(windows.count):
            [(start, stop)] = windows.spans(epoch * windows.count + place)
            assert stop - start == 37
            number, first, length = windows.document(start)
            assert documents[number] == list(range(first, first + length))
            assert first <= start < stop <= first + length
            found.setdefault(number, []).append(start - first)
        assert sorted(documents[number] for number in found) == sorted(kept)
        for number, begins in found.items():
            offset, count = min(begins), len(documents[number]) // 37
            assert sorted(begins) == [offset + 37 * each for each in range(count)]
            assert 0 <= offset <= len(documents[number]) - 37 * count
            if epoch == 0:
                assert offset == 0
            else:
                drawn.add(offset)
    assert len(drawn) > 20


def test_min_document_tokens_leaves_shorter_documents_out_of_the_stream(tmp_path):
    documents = write_dataset(tmp_path / "corpus", lengths=MANY)
    windows = Windows(read_idx(tmp_path / "corpus"), 37, 11, min_len=200)
    long = sorted(token for document in documents if len(document) >= 200 for token in document)
    read = sorted(token for place in range(windows.count) for token in tokens_of(windows, range(sum(MANY)), place))
    assert windows.count == len(long) // 37
    assert len(set(read)) == len(read) == 37 * windows.count
    assert set(read) <= set(long)


def test_epochs_are_shuffled_apart_and_hold_the_same_documents(prefix):
    dataset = train_set(prefix, method="short", train_samples=3 * 39, document_ends="within")
    count = dataset.windows.count
    epochs = [
        [dataset.windows.document(dataset.spans(epoch * count + place)[0][0])[0] for place in range(count)]
        for epoch in range(3)
    ]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])


def blend_of_three(directory: Path, **changes) -> dict:
    """Three sources, of which the last is read many times over and has prompts of its own."""
    for name, first, lengths in (("one", 0, LENGTHS), ("two", 2000, LENGTHS[::-1]), ("small", 4000, (60, 50))):
        write_dataset(directory / name, first_token=first, lengths=lengths)
    blend = [
        (str(directory / "one"), 0.5),
        (str(directory / "two"), 0.3),
        (str(directory / "small"), 0.2, [[7, 8, 9, 10]]),
    ]
    return settings(directory / "one", train=blend, prompts=PROMPTS, method="end_prompt_random", **changes)


CUTS = {
    "cross": {},
    "within": {"document_ends": "within"},
    "long": {"document_ends": "within", "min_document_tokens": 50},
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_order_of_samples_does_not_depend_on_how_many_are_asked_for(tmp_path, cut):
    few, _ = build(**blend_of_three(tmp_path, train_samples=90, **CUTS[cut]))
    many, _ = build(**blend_of_three(tmp_path, train_samples=1000, **CUTS[cut]))
    assert (len(few), len(many)) == (90, 1000)
    for index in range(90):
        assert all(torch.equal(few[index][key], many[index][key]) for key in KEYS)
    small = few.sources[2]
    assert small.windows.epochs(small.size) >= 3  # the order goes on alike past an epoch's end


@pytest.mark.parametrize("cut", CUTS)
def test_global_batches_are_the_same_on_any_number_of_ranks_and_after_a_resume(tmp_path, cut):
    dataset, _ = build(**blend_of_three(tmp_path, train_samples=160, **CUTS[cut]))
    assert max(source.size / source.windows.count for source in dataset.sources) > 3

    def run(ranks: int, first_step: int, steps: int) -> list[list[tuple]]:
        """Steps of 8 samples, 2 a micro-batch: each step's samples, whichever rank reads them."""
        result = []
        for step in range(first_step, steps):
            batches = [MicroBatches(dataset, 8 * step, 2, rank, ranks) for rank in range(ranks)]
            read = [next(batch) for _ in range(8 // (2 * ranks)) for batch in batches]
            rows = [[tuple(batch[key][row].tolist()) for key in KEYS] for batch in read for row in range(2)]
            result.append(rows)
        return result

    whole = run(1, 0, 20)
    assert whole == [
        [[tuple(dataset[8 * step + n][key].tolist()) for key in KEYS] for n in range(8)] for step in range(20)
    ]
    for ranks in (2, 4):
        assert run(ranks, 0, 20) == whole
    assert run(1, 0, 7) + run(4, 7, 12) + run(2, 12, 20) == whole


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [8.0, 2.0, 1.0], [3.0, 0.004, 1.0, 1.0, 9.5]])
def test_sources_of_a_blend_take_turns_by_their_shares(weights):
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    due = sorted(((Fraction(2 * j + 1, 2) / share, k, j) for k, share in enumerate(shares) for j in range(400)))[:300]
    source, within = turns(weights, 300)
    expected = [(k, j) for _, k, j in due]
    assert list(zip(source.tolist(), within.tolist(), strict=True)) == expected
    for count in (0, 1, 2, 17, 300):
        shorter = turns(weights, count)
        assert np.array_equal(shorter[0], source[:count])
        assert np.array_equal(shorter[1], within[:count])
        for k, share in enumerate(shares):
            taken = int((source[:count] == k).sum())
            assert abs(taken - count * share) <= Fraction(1, 2) + share * len(weights) / 2
            assert within[:count][source[:count] == k].tolist() == list(range(taken))


def test_each_source_ends_with_its_own_prompts(tmp_path):
    dataset, _ = build(**blend_of_three(tmp_path, train_samples=120))
    for index in range(120):
        source, _ = dataset.locate(index)
        sample = dataset[index]
        prompt = sample["labels"][sample["prompt_mask"]].tolist()
        assert prompt in ([[7, 8, 9, 10]] if source.prefix.endswith("small") else PROMPTS)
        context = sample["tokens"][: len(sample["tokens"]) - len(prompt)].tolist()
        assert context == source.context(dataset.locate(index)[1])[: len(context)].tolist()


@pytest.mark.parametrize("count", [0, 1, 90, 400])
@pytest.mark.parametrize("cut", CUTS)
def test_what_a_run_consumed_is_what_was_read(tmp_path, cut, count):
    dataset, _ = build(**blend_of_three(tmp_path, train_samples=400, **CUTS[cut]))
    found = consumed(dataset, count)
    assert found["consumed_samples"] == count
    counted = {source.prefix: Counter() for source in dataset.sources}
    for index in range(count):
        sample = dataset[index]
        prompt = int(sample["prompt_mask"].sum())
        counted[dataset.locate(index)[0].prefix].update(samples=1, prompt=prompt, context=24 - prompt)
    for source, windows in zip(found["sources"], (each.windows for each in dataset.sources), strict=True):
        counts = counted[source["prefix"]]
        assert source["samples"] == counts["samples"]
        assert (source["context_tokens"], source["prompt_tokens"]) == (counts["context"], counts["prompt"])
        assert source["epochs"] == counts["samples"] / windows.count
        assert source["share"] == (counts["samples"] / count if count else 0)


def test_what_a_run_consumed_is_counted_without_a_blend(prefix):
    dataset = train_set(prefix, method="short", train_samples=100)
    [source] = consumed(dataset, 50)["sources"]
    assert (source["samples"], source["context_tokens"], source["prompt_tokens"]) == (50, 50 * 24, 0)
    assert source["epochs"] == 50 / (sum(LENGTHS) // 24)
    assert source["left_out_tokens"] == sum(LENGTHS) % 24


def test_pose_takes_its_chunks_from_different_places_of_one_document(tmp_path):
    documents = write_dataset(tmp_path / "corpus", lengths=MANY)
    long = [document for document in documents if len(document) >= 48]
    dataset = train_set(
        tmp_path / "corpus",
        method="pose",
        physical_len=48,
        content_skip=True,
        document_ends="within",
        train_samples=3 * len(long),
    )
    assert dataset.windows.count == len(long)
    apart = 0
    for epoch in range(3):
        read = []
        for index in range(epoch * len(long), (epoch + 1) * len(long)):
            sample = dataset[index]
            tokens, positions = sample["tokens"].tolist(), sample["position_ids"]
            assert positions.tolist() == position_ids("pose", 48, 0, 192, index=index, seed=11).tolist()
            # As published: ids[0:r1] + ids[l2:r2], r1 drawn first for the positions, r2 at least the length.
            r1 = int(generator(11, index, 0).integers(1, 49 // 2, endpoint=True))
            document = next(each for each in long if each[0] == tokens[0])
            l2 = tokens[r1] - document[0]
            assert tokens == document[:r1] + document[l2 : l2 + 48 - r1]
            assert l2 >= r1
            jumps = torch.nonzero(positions.diff() != 1).flatten().tolist()
            assert jumps in ([], [r1 - 1])
            apart += l2 > r1
            read.append(document[0])
        assert sorted(read) == [document[0] for document in long]
    assert apart > 2 * len(long)


def test_large_window_indices_are_cached_and_follow_the_data(prefix, monkeypatch):
    in_memory = train_set(prefix, train_samples=200)
    cache = prefix.parent / "cache"
    assert not cache.exists()  # nothing that is quickly made again is kept
    monkeypatch.setattr(windows_module, "SMALL", 0)
    cached = train_set(prefix, train_samples=200)
    files = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in cache.iterdir()}
    assert len(files) == cached.windows.epochs(200)
    assert all(name.startswith("windows-") for name in files)
    assert [cached.spans(index) for index in range(200)] == [in_memory.spans(index) for index in range(200)]
    train_set(prefix, train_samples=200)
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in cache.iterdir()} == files
    for damaged in (b"", b"12345678"):
        for file in cache.iterdir():
            file.write_bytes(damaged)
        again = train_set(prefix, train_samples=200)
        assert [again.spans(index) for index in range(200)] == [in_memory.spans(index) for index in range(200)]
    write_dataset(prefix, lengths=LENGTHS[::-1])  # another corpus under the old name
    monkeypatch.setattr(windows_module, "SMALL", 1 << 20)
    expected = train_set(prefix, train_samples=200)
    monkeypatch.setattr(windows_module, "SMALL", 0)
    other = train_set(prefix, train_samples=200)
    assert [other.spans(index) for index in range(200)] == [expected.spans(index) for index in range(200)]


def test_draws_are_uniform_and_independent_of_other_seeds_and_streams():
    indices = np.arange(30000)
    first = draws(1, indices, 1, 3)
    assert np.bincount(first).tolist() == pytest.approx([10000] * 3, rel=0.03)
    assert np.array_equal(draws(1, indices[100:200], 1, 3), first[100:200])
    for other in (draws(2, indices, 1, 3), draws(1, indices, 2, 3), draws(1, indices + 1, 1, 3)):
        assert np.bincount(3 * first + other).tolist() == pytest.approx([30000 / 9] * 9, rel=0.06)
    assert draws(2**32 - 1, np.array([2**40]), 2, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        (
            {"document_ends": "within", "physical_len": 400, "target_len": 800},
            ["data.train=", "none of 14 documents", "395"],
        ),
        (
            {"document_ends": "within", "min_document_tokens": 301},
            ["none of 14 documents", "has 301 tokens", "use cross"],
        ),
        ({"min_document_tokens": 250, "physical_len": 400}, ["1 documents of at least 250", "300 tokens", "takes 395"]),
        ({"min_document_tokens": 999}, ["0 documents of at least 999", "data.min_document_tokens"]),
    ],
)
def test_documents_too_short_for_one_window_are_refused(prefix, changes, needles):
    with pytest.raises(InputError) as refused:
        train_set(prefix, **{"target_len": 800, **changes})
    for needle in needles:
        assert needle in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "needle"),
    [
        ("", "should be a PREFIX"),
        ([], "should be a PREFIX"),
        (["a", 1], "should be a PREFIX"),
        (["a", "b", "a"], "a is named twice; give it a weight, such as {a: 2}"),
        ({}, "should be a PREFIX"),
        ({"a": "much"}, "weight=much of a should be a number"),
        ({"a": True}, "weight=True of a should be a number"),
        ({"a": 0}, "weight 0 of a should be above 0"),
        ({"a": {"weight": float("nan")}}, "weight nan of a should be above 0"),
        ({"a": {"wieght": 1}}, "unknown key wieght of a; a source takes weight, prompts"),
        ({"a": {"weight": 1, "prompts": "EP_1"}}, "prompts=EP_1 of a should be a list"),
        ({"a": {"weight": 1, "prompts": []}}, "prompts=[] of a should be a list"),
    ],
)
def test_blends_that_make_no_sense_are_refused(value, needle):
    with pytest.raises(InputError) as refused:
        sources_of(value, "data.train")
    assert needle in str(refused.value)
    assert str(refused.value).startswith("data.train")
    assert "\n" not in str(refused.value)
