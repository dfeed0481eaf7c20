"""The index of packed documents against a best-fit that places one item at a time; every token is counted."""

import bisect
import itertools

import numpy as np
import pytest

from endprompt_megatron.data.samples.packing import Packing, best_fit, pack_epoch

LENGTHS = (7, 40, 1, 1, 200, 33, 24, 90, 5, 64, 128, 24, 25, 300, 0, 19, 22, 2, 3)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The room left in each row, ascending, placing one item at a time."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(room, length)
        left = (room.pop(at) if at < len(room) else capacity) - length
        bisect.insort(room, left)
    return room


@pytest.mark.parametrize("seed", range(6))
def test_best_fit_equals_placing_one_item_at_a_time(seed):
    generator = np.random.default_rng(seed)
    for capacity, longest in ((8, 8), (64, 64), (64, 20), (1000, 999), (1000, 130), (37, 1)):
        for count in (1, 2, 50, 3000):
            lengths = generator.integers(1, longest + 1, count).astype(np.int32)
            rows, number = best_fit(lengths, capacity)
            filled = np.bincount(rows, weights=lengths, minlength=number).astype(int)
            assert len(filled) == number
            assert filled.min() > 0
            assert sorted((capacity - filled).tolist()) == plain_best_fit(lengths.tolist(), capacity)


def test_best_fit_of_no_items_makes_no_rows():
    assert best_fit(np.empty(0, dtype=np.int32), 8)[1] == 0
    assert pack_epoch(np.array([1, 1, 0]), Packing(16, 12, 2, (4,), 1, 0), 0).counts.left_out == 2


@pytest.mark.parametrize("window", [1, 5, 1 << 20])
@pytest.mark.parametrize("align", [1, 8])
def test_a_packed_epoch_holds_every_piece_once_and_counts_every_token(window, align):
    packing = Packing(48, 40, 3, (8, 2), align, seed=4, window=window)
    for number in range(3):
        epoch = pack_epoch(np.array(LENGTHS), packing, number)
        pieces = [
            (document, piece)
            for document, length in enumerate(LENGTHS)
            for piece in range(-(-length // 40))
            if min(40, length - 40 * piece) >= 3
        ]
        assert sorted(zip(epoch.samples["document"].tolist(), epoch.samples["piece"].tolist(), strict=True)) == pieces
        sizes = [min(40, LENGTHS[s["document"]] - 40 * s["piece"]) for s in epoch.samples]
        prompts = [(8, 2)[s["prompt"]] for s in epoch.samples]
        assert epoch.counts.samples == len(pieces)
        assert epoch.counts.context_tokens == sum(sizes)
        assert epoch.counts.prompt_tokens == sum(prompts)
        assert epoch.counts.context_tokens + epoch.counts.left_out == sum(LENGTHS)
        assert epoch.counts.left_out_pieces == 3  # two documents of 1 token and one of 2
        assert epoch.starts[0] == 0
        assert epoch.starts[-1] == len(pieces)
        for first, last in itertools.pairwise(epoch.starts):
            padded = [-(-(a + b) // align) * align for a, b in zip(sizes[first:last], prompts[first:last], strict=True)]
            assert 0 < sum(padded) <= 48


def test_packed_rows_depend_on_seed_and_epoch_alone():
    packing = Packing(64, 60, 2, (4, 1, 3), 1, seed=1)
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    first, again = pack_epoch(lengths, packing, 0), pack_epoch(lengths, packing, 0)
    assert (first.samples == again.samples).all()
    assert (first.starts == again.starts).all()
    for other in (pack_epoch(lengths, packing, 1), pack_epoch(lengths, Packing(64, 60, 2, (4, 1, 3), 1, seed=2), 0)):
        assert (other.samples[:100] != first.samples[:100]).mean() > 0.9
        order = np.lexsort((other.samples["piece"], other.samples["document"]))
        ours = np.lexsort((first.samples["piece"], first.samples["document"]))
        assert (other.samples["prompt"][order] != first.samples["prompt"][ours]).any()
    drawn = np.bincount(first.samples["prompt"])
    assert drawn.min() > 0.25 * drawn.sum()


def test_packing_of_real_lengths_wastes_little():
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 20_000).astype(np.int64) + 1
    for row in (2048, 8192):
        counts = pack_epoch(lengths, Packing(row, row - 11, 2, (11,), 1, seed=0), 0).counts
        assert counts.efficiency(row) > 0.99
