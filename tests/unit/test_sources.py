"""What --input and --manifest may name, and that every way of storing the same documents gives the same dataset."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small import run_tool, small_tokenizer, text
from unit.preparing import expected_documents, stored_documents, write_jsonl

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus import chunks
from endprompt_megatron.data.corpus.chunks import Reading, chunks_of
from endprompt_megatron.data.corpus.inputs import sources_of
from endprompt_megatron.data.corpus.prepare import prepare
from endprompt_megatron.data.corpus.readers import documents

TEXTS = [text(3 + number, number) + "é" * (number % 2) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Files in directories, some of which are none of ours."""
    for name in ("b/two.jsonl", "a.jsonl", "b/one.txt", "c[1].txt", ".hidden/x.jsonl", "b/.x.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    return tmp_path


def names(root: Path, inputs: list[str], manifest: Path | None = None) -> list[str]:
    found = sources_of([str(root / name) for name in inputs], manifest and str(manifest), "text")[0]
    return [os.path.relpath(source.path, root) for source in found]


def read(source: Path | str, step: int | None = None, split_blank_lines: int = 0) -> list:
    """All documents, in pieces of about `step` bytes."""
    reading = Reading(split_blank_lines)
    with pytest.MonkeyPatch.context() as patch:
        if step:
            patch.setattr(chunks, "_CHUNK_BYTES", step)
        cut = chunks_of(sources_of([str(source)], None, "text")[0], reading)
    return [document for piece in cut for _, document in documents(piece, reading)]


def test_directories_and_globs_are_sorted_and_hidden_names_left_out(tree):
    assert names(tree, ["."]) == ["a.jsonl", "b/one.txt", "b/two.jsonl", "c[1].txt"]
    assert names(tree, ["b", "a.jsonl"]) == ["b/one.txt", "b/two.jsonl", "a.jsonl"]
    assert names(tree, ["*.jsonl"]) == ["a.jsonl"]
    assert names(tree, ["**/*.txt"]) == ["b/one.txt", "c[1].txt"]
    assert names(tree, ["c[1].txt"]) == ["c[1].txt"]


def test_paths_of_a_manifest_are_relative_to_it(tree, monkeypatch):
    manifest = tree / "b" / "list"
    manifest.write_text('two.jsonl\n\n{"path": "../a.jsonl", "text_field": "body"}\n  ../c*.txt  \n')
    monkeypatch.chdir("/")
    assert names(tree, ["b/one.txt"], manifest) == ["b/one.txt", "b/two.jsonl", "a.jsonl", "c[1].txt"]
    fields = [source.text_field for source in sources_of([], str(manifest), "text")[0]]
    assert fields == ["text", "body", "text"]


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ("nothing.txt", "list:1: "),
        ('a.jsonl\n{"path": 3}', 'list:2: expected {"path": "FILE"'),
        ('{"path": "a.jsonl", "field": "x"}', "unknown key 'field'"),
        ('{"path": "a.jsonl"', "list:1: not JSON"),
        ("a.jsonl\nb/../a.jsonl", "is given twice"),
        ("", "no input is given"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_line(tree, content, needle):
    (tree / "list").write_text(content)
    with pytest.raises(InputError, match=needle.replace("{", "[{]")) as refused:
        sources_of([], str(tree / "list"), "text")
    assert "\n" not in str(refused.value)


def test_inputs_that_match_nothing_are_refused(tree):
    refused = {"*.parquet": "no file matches", ".hidden/y.jsonl": "no such file", "README.md": "unknown kind"}
    (tree / "empty").mkdir()
    refused["empty"] = "no file in this directory"
    for name, needle in refused.items():
        with pytest.raises(InputError, match=needle):
            names(tree, [name])
    with pytest.raises(InputError, match="given twice"):
        names(tree, ["a.jsonl", "."])
    with pytest.raises(InputError, match="cannot be read"):
        sources_of([], str(tree / "nowhere"), "text")


def jsonl_bytes(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": piece}) + "\n" for piece in texts).encode()


@pytest.mark.parametrize("tool", ["gzip", "zstd", "zstd --long=27 --ultra -22", "zstd -T2 --rsyncable"])
def test_files_of_the_real_compressors_are_read(tmp_path, tool):
    """Also several of them one after the other, which is a file of the same kind."""
    name, *options = tool.split()
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    suffix = {"gzip": "gz", "zstd": "zst"}[name]
    halves = [
        subprocess.run([name, "-c", *options], input=jsonl_bytes(part), capture_output=True, check=True).stdout
        for part in (TEXTS[:30], TEXTS[30:])
    ]
    source = tmp_path / f"a.jsonl.{suffix}"
    source.write_bytes(b"".join(halves))
    assert read(source) == TEXTS


def test_zstd_of_the_largest_window_is_read(tmp_path):
    """zstd --long=31, as large dumps are packed; the library alone refuses more than 128 MiB."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no size in its header
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(jsonl_bytes(TEXTS)) + writer.flush())
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
RECORDS = [{"id": number, "text": each} for number, each in enumerate(TEXTS)]
CONTENTS = {
    "lines": jsonl_bytes(TEXTS),
    "lines-and-blank-lines": b"\n" + jsonl_bytes(TEXTS).replace(b"}\n", b"}\n\n \t\r\n") + b"\n\n",
    "crlf": jsonl_bytes(TEXTS).replace(b"\n", b"\r\n"),
    "no-last-line-break": jsonl_bytes(TEXTS).rstrip(),
    "array": json.dumps(RECORDS).encode(),
    "array-over-lines": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "array-a-record-a-line": b"[\n" + b",\n".join(jsonl_bytes(TEXTS).splitlines()) + b"\n]\n",
    "array-after-a-mark": codecs.BOM_UTF8 + b"\n " + json.dumps(RECORDS).encode(),
    "objects-over-lines": b"\n".join(json.dumps(each, indent=4).encode() for each in RECORDS),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".JSONL", ".Json"])
@pytest.mark.parametrize("compression", COMPRESSORS)
def test_json_of_every_form_ending_and_compression_gives_the_same_texts(tmp_path, content, ending, compression):
    source = tmp_path / f"a{ending}{compression}"
    source.write_bytes(COMPRESSORS[compression](CONTENTS[content]))
    assert read(source, 100) == TEXTS


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("ending", [".txt", ".TXT", ".text"])
def test_texts_are_read_compressed_too_and_split(tmp_path, ending, compression):
    source = tmp_path / f"a{ending}{compression}"
    source.write_bytes(COMPRESSORS[compression]("\n\n\n\n".join(TEXTS).encode()))
    assert read(source, 100) == ["\n\n\n\n".join(TEXTS)]
    assert read(source, 100, split_blank_lines=2) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"', "not_json", "not a JSON array"),
        ("a.json", b"[]", "empty_file", "an array without elements"),
        ("a.json", b'[{"text": "caf\xe9"}]', "not_utf8", "not UTF-8 at byte 14"),
        ("a.json", b'[{"text": "a"}, 3]', "no_field", "no field 'text' (int)"),
        ("a.json", b'[{"text": "\\ud800"}]', "lone_surrogate", "lone surrogate at character 0"),
        ("a.json", b'{\n "data": [{"text": "a"}]\n}', "no_field", "no field 'text' (keys data)"),
        ("a.json", b'{\n "text": "a"\n}\n{\n "text": ', "not_json", "not JSON"),
        ("a.txt.gz", gzip.compress(b"abc" * 99)[:-9], "broken_file", "broken gzip"),
        ("a.txt.xz", b"none", "broken_file", "broken xz"),
        ("a.json.bz2", bz2.compress(b"[1]" * 99)[:-9], "broken_file", "broken bzip2"),
        ("a.txt.gz", gzip.compress(b"caf\xe9"), "not_utf8", "not UTF-8 at byte 3"),
        ("a.txt.gz", gzip.compress(b""), "empty_file", "gzip of an empty file"),
    ],
    ids=range(12),
)
def test_what_is_wrong_with_an_array_or_a_compressed_file_is_said(tmp_path, name, content, kind, message):
    (tmp_path / name).write_bytes(content)
    bad = read(tmp_path / name)[-1]
    assert (bad.kind, bad.message[: len(message)]) == (kind, message)


def test_files_of_a_directory_that_are_not_read_are_listed(tmp_path, tokenizer):
    for name in ("a.jsonl", "b.json", "sub/C.JSONL"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(jsonl_bytes(TEXTS[:5]))
    others = ["README.md", "d.csv", "dataset_infos.json", "e.parquet.gz", "sub/f.jsonl.lz4"]
    for name in others:
        (tmp_path / "in" / name).write_bytes(b"{}")
    run = run_tool("prepare_data", "--input", tmp_path / "in", "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert all(name in run.stdout for name in others)
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["not_read"] == [str(tmp_path / "in" / name) for name in others]
    assert manifest["documents"] == 15


def test_names_that_are_not_utf8_are_read_and_written_into_the_manifest(tmp_path, tokenizer):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    Path(os.fsdecode(name)).write_bytes(jsonl_bytes(TEXTS))
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9out")
    run = run_tool("prepare_data", "--input", os.fsdecode(name), "--tokenizer", tokenizer, "--out", out)
    assert run.returncode == 0, run.stderr
    manifest = json.loads(Path(out + ".json").read_text())
    assert os.fsencode(manifest["sources"][0]["path"]) == name
    assert manifest["documents"] == 40


@pytest.mark.parametrize("step", [50, 400, 10**6])
def test_parquet_of_every_string_type_compression_and_row_group(tmp_path, step):
    import pyarrow
    import pyarrow.parquet

    kinds = {
        "string": pyarrow.array(TEXTS),
        "large_string": pyarrow.array(TEXTS, pyarrow.large_string()),
        "string_view": pyarrow.array(TEXTS, pyarrow.string_view()),
        "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
        "large_dictionary": pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode(),
        "binary": pyarrow.array([each.encode() for each in TEXTS], pyarrow.binary()),
        "large_binary": pyarrow.array([each.encode() for each in TEXTS], pyarrow.large_binary()),
        "binary_view": pyarrow.array([each.encode() for each in TEXTS], pyarrow.binary_view()),
    }
    for number, column in kinds.items():
        table = pyarrow.table({"n": list(range(40)), "text": column})
        for compression in ("snappy", "zstd", "none"):
            source = tmp_path / f"{number}{compression}.parquet"
            pyarrow.parquet.write_table(table, source, row_group_size=3, compression=compression)
            assert read(source, step) == TEXTS


@pytest.mark.parametrize("step", [50, 400, 10**6])
def test_datasets_saved_to_disk_are_read_in_the_order_of_their_rows(tmp_path, step):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"n": list(range(40)), "text": TEXTS})
    dataset.save_to_disk(tmp_path / "plain", num_shards=3)
    assert read(tmp_path / "plain", step) == [dataset[n]["text"] for n in range(40)]
    shuffled = dataset.shuffle(seed=1).select(range(25))
    shuffled.save_to_disk(tmp_path / "shuffled")
    assert read(tmp_path / "shuffled", step) == [row["text"] for row in shuffled]
    both = datasets.DatasetDict({"train": dataset.select(range(30)), "a_test": dataset.select(range(30, 40))})
    both.save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both", step) == TEXTS
    assert read(tmp_path / "both" / "a_test", step) == TEXTS[30:]


def test_a_saved_dataset_that_an_index_file_selects_from_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "plain")
    state = json.loads((tmp_path / "plain/state.json").read_text())
    state["_indices_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "plain/state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="flatten_indices"):
        read(tmp_path / "plain")


def test_a_saved_dataset_that_is_cut_short_or_empty_is_reported(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS * 60})
    dataset.save_to_disk(tmp_path / "cut")
    [arrow] = (tmp_path / "cut").glob("*.arrow")
    whole = arrow.read_bytes()
    for keep in (len(whole) - 8, len(whole) - 9, len(whole) // 2, 100, 8):
        arrow.write_bytes(whole[:keep])
        *texts, bad = read(tmp_path / "cut", 400)
        assert texts == (TEXTS * 60)[: len(texts)]
        assert len(texts) == 2400 or keep < len(whole) - 8
        assert bad.kind == "broken_file"
        assert f"after row {len(texts)} " in bad.message
    datasets.Dataset.from_dict({"text": [""]}).select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="without rows"):
        read(tmp_path / "none")


def test_every_kind_of_file_with_the_same_texts_gives_the_same_dataset(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(jsonl_bytes(TEXTS))
    with pyarrow.output_stream(tmp_path / "c.jsonl.zst", compression="zstd") as file:
        file.write(jsonl_bytes(TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("\n\n\n\n".join(TEXTS))
    sources = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.txt"]
    try:
        import datasets
    except ImportError:
        pass
    else:
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "f")
        sources.append("f")
    found = []
    for name in sources:
        prepare([str(tmp_path / name)], str(tokenizer), str(tmp_path / "out" / name), workers=1, split_blank_lines=2)
        found.append(stored_documents(tmp_path / "out" / name))
    assert found == [expected_documents(TEXTS, tokenizer)] * len(sources)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 13, 10**6])
@pytest.mark.parametrize("blank_lines", [1, 2])
def test_chunks_of_a_split_txt_give_each_document_once(tmp_path, step, blank_lines):
    import re

    content = "one\n\nstill one\n\n\ntwo\n \n\n\n  three é\n\r\n\r\n\nfour\n\n\n \t \n  \n\n\nfive five\n\n\n\n\n"
    source = tmp_path / "a.txt"
    source.write_bytes(content.encode())
    expected = [part.strip("\r\n") for part in re.split(rf"\n(?:[ \t\r]*\n){{{blank_lines},}}", content)]
    assert read(source, step, blank_lines) == [part for part in expected if part]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    source = tmp_path / "a.jsonl"
    write_jsonl(source, TEXTS)
    from endprompt_megatron.data.corpus import prepare as module

    original = module._sha256_once

    def appended(*arguments):
        with open(source, "a") as file:
            file.write('{"text": "late"}\n')
        return original(*arguments)

    monkeypatch.setattr(module, "_sha256_once", appended)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare([str(source)], str(tokenizer), str(tmp_path / "out"), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
