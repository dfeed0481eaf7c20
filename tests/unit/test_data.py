"""Samples against a plain reconstruction from the raw stream of tokens; blends, splits, epochs, caches, slices."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import PATIENCE, ROOT
from unit.building import build

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.indexed import write_idx
from endprompt_megatron.data.samples.batches import KEYS, MicroBatches
from endprompt_megatron.method.positions import MAPS, copies, position_ids
from endprompt_megatron.method.random_streams import PROMPT_STREAM
from endprompt_megatron.model.context_parallel import zigzag_slice

PROMPTS = [[1500, 1501, 1502, 1503, 1504], [1550], [1570, 1571, 1572]]  # no token of the stream
LENGTHS = (7, 40, 1, 1, 200, 33, 24, 90, 5, 64, 128, 24, 24, 300)


def write_dataset(prefix: Path, lengths=LENGTHS, first_token: int = 0, dtype=np.uint16) -> list[list[int]]:
    """An indexed dataset of consecutive, so distinct, tokens; returns the documents."""
    documents, at = [], first_token
    for length in lengths:
        documents.append(list(range(at, at + length)))
        at += length
    np.array([token for document in documents for token in document], dtype=dtype).tofile(f"{prefix}.bin")
    write_idx(Path(f"{prefix}.idx"), np.array(lengths), np.dtype(dtype))
    return documents


@pytest.fixture
def prefix(tmp_path) -> Path:
    write_dataset(tmp_path / "corpus")
    return tmp_path / "corpus"


def settings(prefix: Path, **changes) -> dict:
    values = dict(
        train=[(str(prefix), 1.0)],
        valid=None,
        physical_len=24,
        method="end_prompt",
        target_len=192,
        prompts=PROMPTS[:1],
        prompt_loss_weight=0.25,
        seed=11,
        train_samples=20,
        valid_samples=0,
        cache_dir=prefix.parent / "cache",
    )
    return {**values, **changes}


def train_set(prefix: Path, **changes):
    return build(**settings(prefix, **changes))[0]


def plain_windows(documents: list[list[int]], size: int, seed: int = 11) -> list[list[int]]:
    """An epoch's windows in their order, by joining shuffled documents and cutting, one list operation at a time."""
    random_state = np.random.RandomState(seed)
    order = np.arange(len(documents))
    random_state.shuffle(order)
    stream = [token for document in order for token in documents[document]]
    windows = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
    places = np.arange(len(windows))
    random_state.shuffle(places)
    return [windows[number] for number in places]


def plain_prompt_number(seed: int, index: int, count: int) -> int:
    """SplitMix64 with Python's own numbers."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15
    z = (index * gamma + seed * 0xD1B54A32D192ED03 + (PROMPT_STREAM + 1) * gamma) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 32) * count >> 32


def plain_sample(window, prompts, index, *, physical, target, method, weight, seed, knobs=None) -> dict:
    """The sample as the design page states it, with Python lists."""
    if not MAPS[method].has_prompt:
        prompt = []
    else:
        chosen = plain_prompt_number(seed, index, len(prompts))
        prompt = prompts[chosen] * copies(method, anchors=2)
    b, a = len(prompt), physical - len(prompt)
    tokens = window[:a] + prompt
    if method == "end_prompt":
        positions = list(range(a)) + list(range(target - b, target))
    else:
        positions = position_ids(method, a, b, target, index=index, seed=seed, **(knobs or {})).tolist()
    labels, weights, mask = [], [], []
    for place in range(physical):
        last = place == physical - 1
        to_prompt = not last and place + 1 >= a
        labels.append(0 if last else tokens[place + 1])
        weights.append(0.0 if last else weight if to_prompt else 1.0)
        mask.append(to_prompt)
    return dict(zip(KEYS, (tokens, labels, positions, weights, mask), strict=True))


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("several", [False, True])
def test_samples_of_the_stream_equal_a_plain_reconstruction(tmp_path, method, several):
    documents = write_dataset(tmp_path / "corpus")
    prompts = PROMPTS if several else PROMPTS[:1]
    if method == "end_prompt_pose":
        prompts = [prompt for prompt in prompts if len(prompt) >= 2]
    physical = 64 if method == "full" else 24
    target = 64 if method == "full" else 192
    knobs = {"anchors": 2, "curriculum_samples": 9}
    lengths = {"physical_len": physical, "target_len": target}
    dataset = train_set(tmp_path / "corpus", method=method, prompts=prompts, knobs=knobs, **lengths)
    shortest = min(map(len, prompts)) * copies(method, anchors=2) if MAPS[method].has_prompt else 0
    windows = plain_windows(documents, physical - shortest)
    for index in range(min(len(dataset), len(windows))):
        expected = plain_sample(
            windows[index],
            prompts,
            index,
            physical=physical,
            target=target,
            method=method,
            weight=0.25,
            seed=11,
            knobs=knobs,
        )
        sample = dataset[index]
        assert set(sample) == set(KEYS)
        for key in KEYS:
            assert sample[key].tolist() == expected[key], (key, index)
    dtypes = {key: dataset[0][key].dtype for key in KEYS}
    assert dtypes == dict(zip(KEYS, (torch.int64, torch.int64, torch.int64, torch.float32, torch.bool), strict=True))


def test_an_epoch_of_the_stream_reads_every_token_once(prefix):
    dataset = train_set(prefix, method="short", train_samples=sum(LENGTHS) // 24)
    seen = torch.cat([dataset[index]["tokens"] for index in range(len(dataset))]).tolist()
    assert len(seen) == len(set(seen)) == sum(LENGTHS) // 24 * 24


def test_several_epochs_repeat_the_stream(prefix):
    an_epoch = sum(LENGTHS) // 24
    dataset = train_set(prefix, method="short", train_samples=3 * an_epoch)
    counts = np.bincount(torch.cat([dataset[index]["tokens"] for index in range(len(dataset))]).numpy())
    assert set(counts[: sum(LENGTHS)].tolist()) <= {2, 3}  # an epoch leaves out what does not fill a window


def test_prompts_are_drawn_uniformly_and_purely(prefix):
    first = train_set(prefix, prompts=PROMPTS, train_samples=300)
    again = train_set(prefix, prompts=PROMPTS, train_samples=300)
    order = list(range(300))
    random.Random(0).shuffle(order)
    drawn = {index: int((again[index]["tokens"] >= 1500).sum()) for index in order}
    assert [drawn[index] for index in range(300)] == [int((first[i]["tokens"] >= 1500).sum()) for i in range(300)]
    counts = np.bincount(list(drawn.values()))[[1, 3, 5]]
    assert counts.sum() == 300
    assert counts.min() > 70


def test_changing_a_sample_does_not_change_how_it_is_read_again(prefix):
    dataset = train_set(prefix)
    before = {key: value.clone() for key, value in dataset[3].items()}
    for value in dataset[3].values():
        value.zero_()
    assert all(torch.equal(before[key], dataset[3][key]) for key in KEYS)


def test_int32_tokens_are_read_and_checked_against_the_models_vocabulary(tmp_path):
    write_dataset(tmp_path / "big", first_token=70000, dtype=np.int32)
    dataset = train_set(tmp_path / "big", method="short", vocab_size=71000)
    assert int(dataset[0]["tokens"].min()) >= 70000
    dataset = train_set(tmp_path / "big", method="short", vocab_size=70010)
    too_high = next(index for index in range(len(dataset)) if dataset.context(index).max() >= 70010)
    with pytest.raises(InputError, match="outside the model's vocabulary of 70010"):
        dataset[too_high]


def test_split_holds_out_the_last_documents(prefix):
    train, valid = build(**settings(prefix, valid="3,1", valid_samples=40, method="short"))
    held_out = sum(LENGTHS[: round(0.75 * len(LENGTHS))])
    assert max(int(train[index]["tokens"].max()) for index in range(len(train))) < held_out
    assert min(int(valid[index]["tokens"].min()) for index in range(len(valid))) >= held_out


def test_a_blend_keeps_its_weights_beside_a_validation_dataset(tmp_path):
    for name, first in (("one", 0), ("two", 2000), ("valid", 4000)):
        write_dataset(tmp_path / name, first_token=first)
    train, valid = build(
        **settings(
            tmp_path / "one",
            train=[(str(tmp_path / "one"), 1.0), (str(tmp_path / "two"), 3.0)],
            valid=[(str(tmp_path / "valid"), 1.0)],
            method="short",
            train_samples=80,
            valid_samples=5,
        )
    )
    assert len(train) == 80
    from_two = sum(int(train[index]["tokens"][0]) >= 2000 for index in range(80))
    assert from_two == 60
    assert all(int(valid[index]["tokens"].min()) >= 4000 for index in range(5))


def test_blends_of_many_small_shares_are_built(tmp_path):
    generator_ = random.Random(3)
    for count in (2, 7, 12):
        blend = []
        for number in range(count):
            write_dataset(tmp_path / f"d{number}", lengths=(300, 10))
            blend.append((str(tmp_path / f"d{number}"), generator_.uniform(0.01, 5)))
        for samples in (1, 5, 33):
            dataset = train_set(tmp_path / "d0", train=blend, train_samples=samples)
            assert len([dataset[index] for index in range(samples)]) == len(dataset) == samples


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"physical_len": 2000, "target_len": 4000}, ["data.train=", "shorter than one sample, which takes 1995"]),
        ({"physical_len": 5}, ["context.method=end_prompt", "leaves no context"]),
        ({"prompts": []}, ["context.prompts is empty"]),
        ({"method": "end_prompt_pose", "prompts": [[1550]]}, ["cannot be split into 2 chunks"]),
        ({"valid": "99"}, ["data.valid=99", "99,1"]),
        ({"valid": "0.9,0.1"}, ["two whole numbers"]),
        ({"valid": "999,1", "valid_samples": 2}, ["for validation are shorter than one sample"]),
        ({"vocab_size": 500}, ["context.prompts: token id 1504"]),
        ({"seed": -1}, ["train.seed=-1"]),
    ],
)
def test_impossible_settings_of_samples_are_refused(prefix, changes, needles):
    with pytest.raises(InputError) as refused:
        train_set(prefix, **changes)
    for needle in needles:
        assert needle in str(refused.value)
    assert "\n" not in str(refused.value)


def test_broken_datasets_are_refused(prefix):
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with pytest.raises(InputError, match=r"absent.idx: no such file"):
        train_set(prefix, train=[(str(prefix.parent / "absent"), 1.0)])
    Path(f"{prefix}.json").write_text(json.dumps({"vocab_size": 1700, "max_token_id": 940}))
    with pytest.raises(InputError, match=r"vocab_size=1700 in its manifest does not fit .* vocabulary of 1600"):
        train_set(prefix, vocab_size=1600)
    whole = bin_.read_bytes()
    bin_.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=r"corpus.bin: 1880 bytes where corpus.idx expects 1882"):
        train_set(prefix)
    idx.write_bytes(idx.read_bytes()[:50])
    with pytest.raises(InputError, match="cut short"):
        train_set(prefix)
    idx.write_bytes(b"something else")
    with pytest.raises(InputError, match="not an index"):
        train_set(prefix)
    bin_.unlink()
    with pytest.raises(InputError, match=r"corpus.bin: no such file"):
        train_set(prefix)


def test_micro_batches_of_all_ranks_are_the_run_in_order(prefix):
    dataset = train_set(prefix, prompts=PROMPTS, train_samples=30)
    ranks = [MicroBatches(dataset, 4, 3, rank, 2) for rank in range(2)]
    read = [next(ranks[rank]) for _ in range(2) for rank in range(2)]
    for key in KEYS:
        expected = torch.stack([dataset[index][key] for index in range(4, 16)])
        assert torch.equal(torch.cat([batch[key] for batch in read]), expected)
    resumed = MicroBatches(dataset, 10, 3, 1, 2)
    assert torch.equal(next(resumed)["tokens"], read[3]["tokens"])
    ends = MicroBatches(dataset, len(dataset) - 2, 3, 0, 1)
    with pytest.raises(InputError, match="was asked for"):
        next(ends)


def test_zigzag_slices_of_all_ranks_make_up_the_sequence(prefix):
    sequence = torch.arange(24).view(1, 24)
    assert torch.equal(zigzag_slice(sequence, 0, 1, dim=1), sequence)
    assert zigzag_slice(sequence, 0, 2, dim=1).tolist() == [[*range(6), *range(18, 24)]]
    assert zigzag_slice(sequence, 1, 2, dim=1).tolist() == [[*range(6, 18)]]
    assert zigzag_slice(sequence.T, 2, 3, dim=0).T.tolist() == [[*range(8, 16)]]
    with pytest.raises(ValueError, match="does not divide"):
        zigzag_slice(sequence, 0, 5, dim=1)
    dataset = train_set(prefix)
    whole = next(MicroBatches(dataset, 0, 2, 0, 1))
    for rank in range(2):
        mine = next(MicroBatches(dataset, 0, 2, 0, 1, rank, 2))
        for key in KEYS:
            assert torch.equal(mine[key], zigzag_slice(whole[key], rank, 2, dim=1))


RANK = """
import hashlib, os, sys, warnings
warnings.filterwarnings("ignore")
import torch
from unit.building import build
store = f"file://{sys.argv[1]}/store"
torch.distributed.init_process_group("gloo", init_method=store, rank=int(sys.argv[2]), world_size=2)
train, valid = build(
    train=[(sys.argv[1] + "/one", 1.0), (sys.argv[1] + "/two", 2.0)], valid=[(sys.argv[1] + "/one", 1.0)],
    physical_len=24, method="end_prompt_random", target_len=192, prompts=[[900, 901], [950]], prompt_loss_weight=1.0,
    seed=5, train_samples=40, valid_samples=4, cache_dir=sys.argv[1] + "/cache")
digest = hashlib.sha256()
for dataset, count in ((train, 40), (valid, 4)):
    for index in range(count):
        for key in ("tokens", "position_ids"):
            digest.update(dataset[index][key].numpy().tobytes())
print(digest.hexdigest())
torch.distributed.destroy_process_group()
"""


def test_two_ranks_and_no_ranks_read_the_same_samples(tmp_path):
    for name, first in (("one", 0), ("two", 2000)):
        write_dataset(tmp_path / name, first_token=first)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    results = [rank.communicate(timeout=PATIENCE) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    assert results[0][0] == results[1][0]

    import hashlib

    train, valid = build(
        train=[(f"{tmp_path}/one", 1.0), (f"{tmp_path}/two", 2.0)],
        valid=[(f"{tmp_path}/one", 1.0)],
        physical_len=24,
        method="end_prompt_random",
        target_len=192,
        prompts=[[900, 901], [950]],
        prompt_loss_weight=1.0,
        seed=5,
        train_samples=40,
        valid_samples=4,
        cache_dir=tmp_path / "other_cache",
    )
    digest = hashlib.sha256()
    for dataset, count in ((train, 40), (valid, 4)):
        for index in range(count):
            for key in ("tokens", "position_ids"):
                digest.update(dataset[index][key].numpy().tobytes())
    assert digest.hexdigest() == results[0][0].split()[-1]
