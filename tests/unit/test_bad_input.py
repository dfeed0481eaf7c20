"""Input that holds no document: refused with its place, or with --skip-bad left out, counted and named."""

import gzip
import json
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
from small import assert_one_line_error, run_tool, small_tokenizer, text
from unit.preparing import expected_documents, stored_documents

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus import chunks
from endprompt_megatron.data.corpus.prepare import prepare

TEXTS = [text(4, number) for number in range(30)]
LINES = [json.dumps({"text": piece}).encode() + b"\n" for piece in TEXTS]
BAD = {  # lines, the kind that they count as, and how the one line about each goes on after its place
    "not_utf8": (b'{"text": "caf\xe9"}\n', "not UTF-8 at byte 13 of the line"),
    "not_json": (b'{"text": "x"\n', "not JSON (Expecting ',' delimiter"),
    "no_field": (b'{"body": "x"}\n', "no field 'text' (keys body); --text-field names another"),
    "not_text": (b'{"text": null}\n', "field 'text' is null, not text"),
    "lone_surrogate": (b'{"text": "a\\ud800"}\n', "lone surrogate at character 1"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture
def prepared(tokenizer, tmp_path):
    """Refused without --skip-bad, in one line that has the needle; with it, the manifest."""

    def run(inputs: list[Path], needle: str, **options) -> dict:
        arguments = ([str(path) for path in inputs], str(tokenizer), str(tmp_path / "out"))
        with pytest.raises(InputError) as refused:
            prepare(*arguments, workers=1, **options)
        assert needle in str(refused.value)
        assert "\n" not in str(refused.value)
        assert not list(tmp_path.glob("*out*"))
        manifest = prepare(*arguments, workers=1, skip_bad=True, **options)
        assert needle in next(iter(manifest["skipped"].values()))["first"][0]
        return manifest

    return run


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_bad_lines_of_a_jsonl_are_named_or_skipped_and_counted(
    prepared, tokenizer, tmp_path, monkeypatch, kind, suffix
):
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 200)
    line, message = BAD[kind]
    lines = list(LINES)
    for at in (3, 4, 9, 14, 19, 24, 29):
        lines.insert(at, line)
    source = tmp_path / f"a{suffix}"
    write_compressed(source, b"".join(lines))
    manifest = prepared([source], f"{source}:4: {message}")
    assert stored_documents(tmp_path / "out") == expected_documents(TEXTS, tokenizer)
    assert list(manifest["skipped"]) == [kind]
    assert manifest["skipped"][kind]["count"] == 7
    places = [first.split(": ")[0] for first in manifest["skipped"][kind]["first"]]
    assert places == [f"{source}:{number}" for number in (4, 5, 10, 15, 20)]
    assert manifest["sources"][0]["skipped"] == 7


def write_compressed(path: Path, data: bytes) -> None:
    import pyarrow

    if path.suffix == ".gz":
        data = gzip.compress(data)
    with pyarrow.output_stream(path, compression="zstd" if path.suffix == ".zst" else None) as file:
        file.write(data)


def whole_lines_of(data: bytes, suffix: str) -> list[bytes]:
    """By another implementation of each format: what can be decompressed, up to the last line end."""
    if suffix == ".gz":
        found = zlib.decompressobj(31).decompress(data)
    else:
        if shutil.which("zstd") is None:
            pytest.skip("there is no zstd")
        found = subprocess.run(["zstd", "-dc"], input=data, capture_output=True).stdout
    return found[: found.rfind(b"\n") + 1].splitlines(keepends=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_the_complete_lines_of_a_truncated_compressed_file_are_kept(prepared, tokenizer, tmp_path, suffix, share):
    import random

    words = [format(random.Random(n).getrandbits(80), "x") for n in range(30_000)]
    lines = [json.dumps({"text": " ".join(words[n : n + 3])}).encode() + b"\n" for n in range(0, 30_000, 3)]
    source = tmp_path / f"a.jsonl{suffix}"
    write_compressed(source, b"".join(lines))
    data = source.read_bytes()[: int(source.stat().st_size * share)]
    source.write_bytes(data)
    whole = whole_lines_of(data, suffix)
    assert len(whole) < len(lines)
    name = {".gz": "gzip", ".zst": "zstd"}[suffix]
    if not whole:  # zstd: the first block of all is cut
        with pytest.raises(InputError, match=f"broken {name} after line 0"):
            prepare([str(source)], str(tokenizer), str(tmp_path / "out"), workers=1)
        return
    manifest = prepared([source], f"{source}: broken {name} after line {len(whole)} (")
    assert stored_documents(tmp_path / "out") == expected_documents(
        [json.loads(line)["text"] for line in whole], tokenizer
    )
    assert manifest["skipped"]["broken_file"]["count"] == 1


def test_bad_texts_in_a_txt_are_named_by_line(prepared, tokenizer, tmp_path):
    (tmp_path / "whole.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    (tmp_path / "good.txt").write_bytes(b"\xef\xbb\xbffine")
    manifest = prepared(
        [tmp_path / "whole.txt", tmp_path / "good.txt"], "whole.txt:3: not UTF-8 at byte 11; convert it first"
    )
    assert stored_documents(tmp_path / "out") == expected_documents(["fine"], tokenizer)
    assert [source["skipped"] for source in manifest["sources"]] == [1, 0]


def test_only_the_bad_document_of_a_split_txt_is_skipped(prepared, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 7)
    (tmp_path / "a.txt").write_bytes(b"one\n\n\ntwo\nca\xe9\n\n\nthree\n\n\n\xff\n")
    manifest = prepared([tmp_path / "a.txt"], "a.txt:5: not UTF-8 at byte 12", split_blank_lines=2)
    assert stored_documents(tmp_path / "out") == expected_documents(["one", "three"], tokenizer)
    assert [place.split(": ")[0][-7:] for place in manifest["skipped"]["not_utf8"]["first"]] == ["a.txt:5", ".txt:11"]


def test_null_and_invalid_texts_in_a_parquet_are_named_by_row(prepared, tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"one", None, b"ca\xe9", b"two"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=3)
    manifest = prepared([tmp_path / "a.parquet"], "a.parquet: row 2: 'text' is null, not text")
    assert stored_documents(tmp_path / "out") == expected_documents(["one", "two"], tokenizer)
    assert "a.parquet: row 3: not UTF-8 at byte 2" in manifest["skipped"]["not_utf8"]["first"][0]


@pytest.mark.parametrize("kind", ["truncated", "damaged", "no-parquet"])
def test_a_broken_parquet_is_named_and_skipped(prepared, tokenizer, tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": TEXTS})
    source = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(table, source, row_group_size=10, compression="snappy", write_page_checksum=False)
    data = bytearray(source.read_bytes())
    kept, group = 0, pyarrow.parquet.ParquetFile(source).metadata.row_group(1).column(0)
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "damaged":  # the second of three row groups
        begin, kept = group.dictionary_page_offset or group.data_page_offset, 10
        data[begin : begin + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    else:
        data = b"PAR1 not really PAR1"
    source.write_bytes(data)
    (tmp_path / "a.jsonl").write_bytes(LINES[0])
    manifest = prepared([tmp_path / "a.jsonl", source], f"{source}: broken parquet file after row {kept} (")
    assert manifest["skipped"]["broken_file"]["count"] == 1
    left = [*TEXTS[:kept], *(TEXTS[20:] if kept else [])]
    assert stored_documents(tmp_path / "out") == expected_documents([TEXTS[0], *left], tokenizer)


@pytest.mark.parametrize("name", ["b.jsonl", "b.txt", "b.parquet", "b.jsonl.gz", "b.jsonl.zst", "c.jsonl.gz"])
def test_an_empty_input_file_is_named_or_skipped(prepared, tokenizer, tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.startswith("c") else b"")
    (tmp_path / "a.jsonl").write_bytes(LINES[0])
    manifest = prepared([tmp_path / name, tmp_path / "a.jsonl"], "empty file")
    assert manifest["skipped"]["empty_file"]["count"] == 1
    assert stored_documents(tmp_path / "out") == expected_documents(TEXTS[:1], tokenizer)


def test_a_missing_file_or_column_is_never_skipped(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_bytes(LINES[0])
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    for name, needle in (("a.parquet", "no column 'text'"), ("b.jsonl", "no such file")):
        inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / name)]
        with pytest.raises(InputError, match=needle):
            prepare(inputs, str(tokenizer), str(tmp_path / "out"), workers=1, skip_bad=True)


def test_prepare_data_reports_what_it_skipped(tokenizer, tmp_path):
    bad = b"".join(line for line, _ in BAD.values())
    (tmp_path / "a.jsonl").write_bytes(LINES[0] + bad + BAD["not_json"][0] + LINES[1])
    arguments = ["--input", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--out", tmp_path / "out"]
    assert_one_line_error(run_tool("prepare_data", *arguments), "a.jsonl:2: not UTF-8")
    result = run_tool("prepare_data", *arguments, "--skip-bad")
    assert result.returncode == 0, result.stderr
    [line] = result.stdout.splitlines()
    assert f"{tmp_path}/out: 2 documents, " in line
    for said in ("2 not_json", "1 not_utf8", "1 lone_surrogate", "(first: ", "a.jsonl:6: lone surrogate"):
        assert said in line


def test_json_that_only_python_accepts_is_a_document(tokenizer, tmp_path):
    content = '\ufeff{"text": "one", "score": NaN}\r\n{"text": "two", "n": 123456789012345678901234567890}\n'
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    prepare([str(tmp_path / "a.jsonl")], str(tokenizer), str(tmp_path / "out"), workers=1)
    assert stored_documents(tmp_path / "out") == expected_documents(["one", "two"], tokenizer)
