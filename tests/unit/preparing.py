"""What the tests of prepared data share: a tokenizer, a corpus of every kind of file, and what a dataset holds."""

import gzip
import json
from pathlib import Path

from small import text

EOS = 1  # of small_tokenizer


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": piece, "id": 1}) + "\n" for piece in texts), encoding="utf-8")
    return str(path)


def write_corpus(directory: Path, documents: int = 80) -> tuple[list[str], list[str]]:
    """Files of every kind, and their documents in order."""
    import pyarrow
    import pyarrow.parquet

    texts = [text(5 + number % 40, number) + " — é" * (number % 3) for number in range(documents)]
    texts[0] += "\r\n\r\nmore"
    at = [1 + number * (documents - 1) // 4 for number in range(5)]
    files = [directory / name for name in ("one.txt", "two.jsonl", "three.jsonl.gz", "four.jsonl.zst", "five.parquet")]
    files[0].write_bytes(texts[0].encode())
    write_jsonl(files[1], texts[at[0] : at[1]])
    with gzip.open(files[2], "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts[at[1] : at[2]]))
    with pyarrow.output_stream(files[3], compression="zstd") as file:
        file.write("\n".join(json.dumps({"text": t}) for t in texts[at[2] : at[3]]).encode())
    table = pyarrow.table({"text": texts[at[3] :], "n": list(range(documents - at[3]))})
    pyarrow.parquet.write_table(table, files[4], row_group_size=7)
    return [str(file) for file in files], texts


def expected_documents(texts: list[str], tokenizer: Path) -> list[list[int]]:
    """The ids of each text and EOS, by transformers."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return [[*loaded.encode(piece, add_special_tokens=False), EOS] for piece in texts]


def stored_documents(prefix: Path | str) -> list[list[int]]:
    """What Megatron reads."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def three_files(prefix: Path | str) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]
