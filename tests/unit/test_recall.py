"""Recall prompts against a plain reconstruction: what is recalled stood in the context, and only the rest is asked."""

import numpy as np
import pytest
import torch
from unit.building import build
from unit.test_data import PROMPTS, train_set, write_dataset

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints.context_rules import check_methods
from endprompt_megatron.config.recipe import Recall as RecallKeys
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.samples.batches import KEYS, MicroBatches
from endprompt_megatron.data.samples.builder import SampleBuilder, SampleSpec
from endprompt_megatron.method.positions import MAPS, copies, position_ids
from endprompt_megatron.method.recall import Recall

CUE = (1900, 1901, 1902)
TARGET, PHYSICAL = 512, 64


def builder(method="end_prompt", recall=Recall(CUE, 10, 4), prompts=PROMPTS, **knobs) -> SampleBuilder:  # noqa: B008
    return SampleBuilder(SampleSpec(method, PHYSICAL, TARGET, prompts, 0.25, 7, recall, knobs))


def plain_sample(context: list[int], place: list[int], method: str, index: int, knobs: dict) -> dict:
    """A sample whose copies of the prompt recall 10 tokens from these places, 4 of them given, with Python lists."""
    terminal, asked = [], []
    for start in place:
        terminal += [*CUE, *context[start : start + 10]]
        asked += [0.25] * 3 + [0.0] * 4 + [0.25] * 6
    a, b = len(context), len(terminal)
    tokens = context + terminal
    positions = position_ids(method, a, b, TARGET, index=index, seed=7, **knobs).tolist()
    weights = [1.0] * (a - 1) + asked + [0.0]
    mask = [False] * (a - 1) + [True] * b + [False]
    return dict(zip(KEYS, (tokens, [*tokens[1:], 0], positions, weights, mask), strict=True))


@pytest.mark.parametrize("method", [name for name, position_map in MAPS.items() if position_map.has_prompt])
def test_recall_samples_equal_a_plain_reconstruction(method):
    knobs = {"anchors": 3, "curriculum_samples": 20}
    build, count = builder(method, **knobs), copies(method, anchors=3)
    a = PHYSICAL - 13 * count
    assert (build.context_len, build.length, build.prompt_lens) == (a, PHYSICAL, [13 * count])
    for index in range(40):
        context = np.arange(5000, 5000 + a)  # distinct: a span tells where it was taken
        sample = build.build(context, index)
        place = [int(sample["tokens"][a + 13 * copy + 3]) - 5000 for copy in range(count)]
        assert place == build.recalled(index)
        assert all(0 <= start <= a - 10 for start in place)
        expected = plain_sample(context.tolist(), place, method, index, knobs)
        for key in KEYS:
            assert sample[key].tolist() == expected[key], (key, index)


def test_recalled_places_are_uniform_over_the_context_and_pure():
    build, again = builder(), builder()
    places = [build.recalled(index)[0] for index in range(6000)]
    assert places[::-7] == [again.recalled(index)[0] for index in range(5999, -1, -7)]
    counts = np.bincount(places)
    assert len(counts) == 64 - 13 - 10 + 1  # the last span ends with the context
    assert (np.abs(counts - 6000 / len(counts)) < 5 * np.sqrt(6000 / len(counts))).all()
    other = SampleBuilder(SampleSpec("end_prompt", PHYSICAL, TARGET, PROMPTS, 0.25, 8, Recall(CUE, 10, 4)))
    assert [other.recalled(index)[0] for index in range(50)] != places[:50]


def test_share_of_samples_recalls_and_the_others_end_with_the_ordinary_prompts():
    build, plain = builder(recall=Recall(CUE, 10, 4, 0.3)), builder(recall=None)
    assert build.prompt_lens == [5, 1, 3, 13]
    numbers = build.prompt_numbers(np.arange(4000))
    assert np.mean(numbers == 3) == pytest.approx(0.3, abs=0.04)
    context = np.arange(5000, 5000 + PHYSICAL)
    for index in range(60):
        sample, recalls = build.build(context, index), bool(build.recalled(index))
        assert recalls == (numbers[index] == 3)
        assert len(sample["tokens"]) == PHYSICAL
        ended = plain.build(context, index)
        assert recalls or all(torch.equal(sample[key], ended[key]) for key in KEYS)


def test_dataset_counts_and_reads_recall_prompts(tmp_path):
    write_dataset(tmp_path / "corpus")
    recall = Recall(CUE, 6, 2, 0.5)
    dataset = train_set(tmp_path / "corpus", recall=recall, prompts=PROMPTS[1:2], vocab_size=1950, train_samples=40)
    prompts = sum(int(dataset[index]["prompt_mask"].sum()) for index in range(40))
    recalling = [index for index in range(40) if dataset.recalled(index)]
    assert prompts == dataset.taken(40)["prompt_tokens"] == 9 * len(recalling) + (40 - len(recalling))
    assert 10 < len(recalling) < 30
    for index in recalling:
        tokens = dataset[index]["tokens"].tolist()
        [place] = dataset.recalled(index)
        assert tokens[15:] == [*CUE, *tokens[place : place + 6]]
    with pytest.raises(InputError, match="token id 1902 is outside the model's vocabulary of 1902"):
        train_set(tmp_path / "corpus", recall=recall, vocab_size=1902)
    with pytest.raises(InputError, match=r"context\.recall\.tokens with data\.packing=documents"):
        train_set(tmp_path / "corpus", recall=recall, packing="documents")
    with pytest.raises(InputError, match="a context of 10 tokens has no span of 11"):
        train_set(tmp_path / "corpus", recall=Recall(CUE, 11, 2))


def test_context_parallel_ranks_hold_the_weights_of_their_recall_tokens(tmp_path):
    write_dataset(tmp_path / "corpus")
    dataset = train_set(tmp_path / "corpus", recall=Recall(CUE, 6, 2))
    whole = next(MicroBatches(dataset, 0, 4, 0, 1))
    shares = [next(MicroBatches(dataset, 0, 4, 0, 1, rank, 2)) for rank in range(2)]
    for key, value in whole.items():
        joined = torch.cat([shares[0][key][:, :6], shares[1][key], shares[0][key][:, 6:]], 1)
        assert torch.equal(joined, value), key
    assert int((whole["loss_weights"] == 0).sum()) == 4 * 3  # two tokens of each key, and the last place


def test_sources_of_a_blend_arrive_at_the_end_of_a_curriculum_together(tmp_path):
    for name in ("one", "two"):
        write_dataset(tmp_path / name)
    blend = [(str(tmp_path / "one"), 3.0), (str(tmp_path / "two"), 1.0)]
    settings = dict(
        physical_len=24,
        method="end_prompt_curriculum",
        target_len=192,
        prompts=PROMPTS[:1],
        prompt_loss_weight=1.0,
        seed=1,
        train_samples=120,
        valid_samples=4,
        knobs={"curriculum_samples": 80},
    )
    train, valid = build(train=blend, valid=blend, **settings)
    ends = np.array([int(train[index]["position_ids"][-1]) for index in range(120)])
    assert (ends[84:] == 191).all()
    assert (ends[:76] < 191).all()
    expected = np.round(24 * 8 ** (np.arange(80) / 80)) - 1
    assert (np.abs(np.log(ends[:80] / expected)) < 0.12).all()  # a source's samples are up to 4 of the run apart
    assert all(int(valid[index]["position_ids"][-1]) == 191 for index in range(4))  # validation stands at the end
    longer, _ = build(train=blend, valid=None, **{**settings, "train_samples": 300})
    assert ends.tolist() == [int(longer[index]["position_ids"][-1]) for index in range(120)]


@pytest.mark.parametrize(
    ("changes", "recall", "needles"),
    [
        ({}, {"key": 4}, ["context.recall.tokens is 0", "such as 53"]),
        ({"method": "short"}, {"tokens": 20}, ["context.method=short", "end_prompt_near"]),
        ({}, {"tokens": 20, "key": 20}, ["context.recall.key=20", "context.recall.tokens=20"]),
        ({"physical": 40}, {"tokens": 20}, ["context.recall.tokens=20", "context.physical=40", "at most 19"]),
        ({"method": "end_prompt_multi", "physical": 100}, {"tokens": 20}, ["context.recall.tokens=20", "at most 19"]),
        ({}, {"tokens": 20, "share": 0.0}, ["context.recall.share=0.0", "at most 1"]),
        ({}, {"tokens": 20, "share": 1.5}, ["context.recall.share=1.5"]),
        ({"method": "end_prompt_curriculum"}, {}, ["context.curriculum_samples is missing", "The run has 640"]),
    ],
)
def test_recall_keys_that_do_not_go_together_are_refused_in_one_line(changes, recall, needles):
    recipe = Recipe()
    recipe.train.steps = 10
    for key, value in changes.items():
        setattr(recipe.context, key, value)
    recipe.context.recall = RecallKeys(**recall)
    with pytest.raises(InputError) as refused:
        check_methods(recipe, "recipe.yaml")
    line = str(refused.value)
    assert line.startswith("recipe.yaml: context.")
    assert "\n" not in line
    assert all(needle in line for needle in needles), line
