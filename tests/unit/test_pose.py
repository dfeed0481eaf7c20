"""PoSE against its published algorithm, written out anew (Zhu et al., 2024, section 3; two chunks, content skip).

c = min(n, W) tokens of a document's first n, at most 5 W, to which its script cuts it; r1 ~ U{1 .. floor((c+1)/2)},
r2 ~ U{c .. n}, l2 = r2 - (c - r1); tokens ids[0:r1] + ids[l2:r2]; u ~ U{0 .. T-c}; positions 0..r1-1 and r1+u..c-1+u;
every next token has weight 1.
"""

import numpy as np
import pytest
from unit.test_data import train_set, write_dataset

from endprompt_megatron.method.positions import pose_content, position_ids

WINDOW, TARGET = 24, 200
LENGTHS = (24, 25, 31, 40, 63, 200, 10)  # one just fits, the last is too short for a sample


def published(document: list[int], r1: int, r2: int, u: int, c: int) -> tuple[list[int], list[int]]:
    l2 = r2 - (c - r1)
    tokens = document[0:r1] + document[l2:r2]
    return tokens, list(range(r1)) + [r1 + u + i for i in range(c - r1)]


def drawn(length: int, document_len: int, index: int, seed: int) -> tuple[int, int, int]:
    """(r1, r2, u) behind a sample, read off what our two functions give."""
    r1, l2 = pose_content(length, document_len, index=index, seed=seed)
    positions = position_ids("pose", length, 0, TARGET, index=index, seed=seed)
    return r1, l2 + length - r1, int(positions[-1]) - (length - 1)


@pytest.mark.parametrize("seed", [0, 1, 7, 42, 2**32 - 1])
def test_pose_samples_are_the_published_ones_given_r1_r2_and_u(tmp_path, seed):
    documents = write_dataset(tmp_path / "corpus", lengths=LENGTHS)
    dataset = train_set(
        tmp_path / "corpus",
        method="pose",
        document_ends="within",
        content_skip=True,
        physical_len=WINDOW,
        target_len=TARGET,
        seed=seed,
        train_samples=60,
    )
    whose = {document[0]: document for document in documents}
    seen = set()
    for index in range(60):
        sample = dataset[index]
        document = whose[int(sample["tokens"][0])]
        r1, r2, u = drawn(WINDOW, len(document), index, seed)
        assert 1 <= r1 <= (WINDOW + 1) // 2
        assert WINDOW <= r2 <= min(len(document), 5 * WINDOW)
        assert 0 <= u <= TARGET - WINDOW
        tokens, positions = published(document, r1, r2, u, WINDOW)
        assert sample["tokens"].tolist() == tokens
        assert sample["position_ids"].tolist() == positions
        assert sample["loss_weights"].tolist() == [1.0] * (WINDOW - 1) + [0.0]
        seen.add(len(document))
    assert seen == set(LENGTHS[:-1])


def test_pose_takes_nothing_from_behind_five_windows_of_a_document():
    ends = {drawn(WINDOW, 10_000, index, 3)[1] for index in range(3000)}
    assert (min(ends), max(ends)) == (WINDOW, 5 * WINDOW)


def test_pose_draws_have_the_published_distributions_and_are_independent():
    n, c, count = 60, WINDOW, 8000
    values = np.array([drawn(c, n, index, seed) for seed in range(40) for index in range(count // 40)]).T
    ranges = ((1, (c + 1) // 2), (c, n), (0, TARGET - c))
    for drawn_values, (low, high) in zip(values, ranges, strict=True):
        counts = np.bincount(drawn_values, minlength=high + 1)
        assert counts[:low].sum() == 0
        assert len(counts) == high + 1
        cells = high - low + 1
        chi_square = ((counts[low:] - count / cells) ** 2 / (count / cells)).sum()
        assert chi_square < cells - 1 + 5 * np.sqrt(2 * (cells - 1))
    correlation = np.corrcoef(values)[np.triu_indices(3, 1)]
    assert (np.abs(correlation) < 5 / np.sqrt(count)).all()
