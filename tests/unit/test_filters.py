"""Lengths, copies and held-out documents, against a plain reading of the corpus one document after the other."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small import assert_one_line_error, run_tool, small_tokenizer, text
from unit.preparing import expected_documents, stored_documents, write_jsonl

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus import chunks, filters
from endprompt_megatron.data.corpus.filters import Filters, digest_of, first_of_each, histogram
from endprompt_megatron.data.corpus.prepare import prepare


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Of lengths from 0 to 60 words, a third of them copies of an earlier one."""
    generator, found = random.Random(5), []
    for number in range(600):
        copy = found and generator.random() < 0.33
        found.append(generator.choice(found) if copy else text(generator.randrange(61), number))
    return found


@pytest.fixture
def files(tmp_path, texts, monkeypatch) -> list[str]:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 3000)
    parts = (texts[:200], texts[200:450], texts[450:])
    return [write_jsonl(tmp_path / f"{number}.jsonl", part) for number, part in enumerate(parts)]


def test_dedup_keeps_only_the_first_of_equal_texts_over_all_files(files, texts, tokenizer, tmp_path, monkeypatch):
    # Groups of 50 digests at once: the result is that of all together.
    monkeypatch.setattr(filters, "_MAX_SORTED", 50)
    manifest = prepare(files, str(tokenizer), str(tmp_path / "out"), workers=1, filters=Filters(dedup=True))
    kept = [piece for piece in dict.fromkeys(texts) if piece]
    expected = expected_documents(kept, tokenizer)
    assert stored_documents(tmp_path / "out") == expected
    empty = texts.count("")
    assert manifest["left_out"] == {
        "empty": empty,
        "too_short": 0,
        "too_long": 0,
        "duplicates": len(texts) - empty - len(kept),
    }
    # Of each source: what stayed of it.
    parts, seen = (texts[:200], texts[200:450], texts[450:]), {""}
    for part, source in zip(parts, manifest["sources"], strict=True):
        own = [piece for piece in dict.fromkeys(part) if piece not in seen]
        seen.update(own)
        assert (source["documents"], source["tokens"]) == (
            len(own),
            sum(map(len, expected_documents(own, tokenizer))),
        )


def test_length_filters_count_the_stored_tokens(files, texts, tokenizer, tmp_path):
    limits = Filters(min_tokens=30, max_tokens=90)
    manifest = prepare(files, str(tokenizer), str(tmp_path / "out"), workers=1, filters=limits)
    everything = [ids for ids in expected_documents(texts, tokenizer) if len(ids) > 1]
    assert stored_documents(tmp_path / "out") == [ids for ids in everything if 30 <= len(ids) <= 90]
    assert {len(ids) for ids in stored_documents(tmp_path / "out")} >= {30, 90}
    assert manifest["left_out"]["too_short"] == sum(len(ids) < 30 for ids in everything)
    assert manifest["left_out"]["too_long"] == sum(len(ids) > 90 for ids in everything)


def test_held_out_documents_are_chosen_by_text_and_seed_alone(files, texts, tokenizer, tmp_path):
    def split(name: str, inputs: list[str], seed: int, **more) -> tuple[Counter, Counter]:
        chosen = Filters(held_out=0.25, seed=seed, **more)
        manifest = prepare(inputs, str(tokenizer), str(tmp_path / name), workers=1, filters=chosen)
        train, valid = (stored_documents(f"{tmp_path / name}{output}") for output in ("", "-valid"))
        other = json.loads((tmp_path / f"{name}-valid.json").read_text())
        assert (manifest["split"], other["split"]) == ("train", "valid")
        assert (len(train), len(valid)) == (manifest["documents"], other["documents"])
        assert manifest["held_out"] == other["held_out"] == {"documents": len(valid), "tokens": sum(map(len, valid))}
        return Counter(map(tuple, train)), Counter(map(tuple, valid))

    train, valid = split("one", files, 1)
    assert train + valid == Counter(tuple(ids) for ids in expected_documents(texts, tokenizer) if len(ids) > 1)
    assert not train.keys() & valid.keys()  # copies never stand on both sides
    assert 0.17 < len(valid) / len(train + valid) < 0.33
    assert split("turned", files[::-1], 1) == (train, valid)
    _, other = split("two", files, 2)
    assert other.keys() != valid.keys()
    once = split("once", files, 1, dedup=True)
    assert once == (Counter(dict.fromkeys(train, 1)), Counter(dict.fromkeys(valid, 1)))
    # What is left of the corpus does not change sides.
    _, fewer = split("fewer", files[:1], 1)
    assert fewer.keys() <= valid.keys()


def test_the_length_histogram_is_in_powers_of_two(files, texts, tokenizer, tmp_path):
    manifest = prepare(files, str(tokenizer), str(tmp_path / "out"), workers=1)
    lengths = [len(ids) for ids in stored_documents(tmp_path / "out")]
    expected = []
    for power in range(12):
        here = [length for length in lengths if 2**power <= length < 2 ** (power + 1)]
        if here:
            bucket = {"from": 2**power, "to": 2 ** (power + 1) - 1, "documents": len(here), "tokens": sum(here)}
            expected.append(bucket)
    assert manifest["lengths"] == expected
    edges = np.array([1, 2, 3, 4, 7, 8, 2**30 - 1, 2**30, 2**31 - 1], dtype=np.int32)
    assert [(bucket["from"], bucket["documents"]) for bucket in histogram(edges)] == [
        *((1, 1), (2, 2), (4, 2), (8, 1)),
        *((2**29, 1), (2**30, 2)),
    ]


@pytest.mark.parametrize("together", [1, 5, 1000])
def test_texts_whose_digests_agree_in_one_half_are_not_copies(tmp_path, monkeypatch, together):
    monkeypatch.setattr(filters, "_MAX_SORTED", together)
    keys = np.array([[1, 2], [1, 3], [2, 2], [1, 2], [2**64 - 1, 0], [2**64 - 1, 0], [1, 3]], dtype="<u8")
    keys[:4].tofile(tmp_path / "a")
    keys[4:4].tofile(tmp_path / "none")
    keys[4:].tofile(tmp_path / "b")
    found = first_of_each([tmp_path / "a", tmp_path / "none", tmp_path / "b"])
    assert found.tolist() == [True, True, True, False, True, False, False]
    assert len(digest_of("é")) == 16
    assert digest_of("é") != digest_of("e")


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"min_tokens": -1}, "--min-tokens -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "--max-tokens 8: should be at least 9"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"held_out": -0.1}, "--held-out -0.1"),
    ],
)
def test_contradictory_filters_are_refused(options, needle):
    with pytest.raises(InputError, match=needle):
        Filters(**options)


def test_filters_that_leave_nothing_are_named_in_the_error(files, tokenizer, tmp_path):
    arguments = ["--input", *files, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--workers", 1]
    before = sorted(tmp_path.iterdir())
    assert_one_line_error(run_tool("prepare_data", *arguments, "--min-tokens", 9999), "no tokens in", "too_short")
    assert_one_line_error(
        run_tool("prepare_data", *arguments, "--held-out", "0.000001"), "none of", "--seed", "larger share"
    )
    assert_one_line_error(run_tool("prepare_data", *arguments, "--held-out", "7"), "--held-out 7")
    assert sorted(tmp_path.iterdir()) == before
