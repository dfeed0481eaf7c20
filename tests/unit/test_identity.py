"""What a run trains on, told by its content."""

import itertools
import json
import random
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from small import small_tokenizer, text

from endprompt_megatron.checkpoint.resume import refuse_other_data
from endprompt_megatron.common import direct_io
from endprompt_megatron.common.direct_io import combined_crc32
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus.prepare import prepare
from endprompt_megatron.data.samples.identity import identity_of


@pytest.mark.parametrize("library", ["isal", "zlib"])
def test_crc32_of_chunks_is_that_of_the_whole(library, monkeypatch):
    if library == "zlib":
        monkeypatch.setattr(direct_io, "crc32_combine", None)
    data = random.Random(0).randbytes(300_000)
    for cuts in ([0, 300_000], [0, 0, 1, 4096, 4097, 299_999, 300_000], list(range(0, 300_001, 10_000))):
        chunks = [data[begin:end] for begin, end in itertools.pairwise(cuts)]
        assert combined_crc32((len(chunk), zlib.crc32(chunk)) for chunk in chunks) == zlib.crc32(data)
    assert combined_crc32([]) == 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


def prepared(tmp_path: Path, tokenizer: Path, name: str, texts: list[str], **options) -> list[dict]:
    """The identity of a dataset of these texts, trained on under its PREFIX."""
    source, out = tmp_path / f"{name}.jsonl", tmp_path / name / "train"
    source.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    prepare([str(source)], str(tokenizer), str(out), workers=1, **options)
    manifest = json.loads(Path(f"{out}.json").read_text())
    assert manifest["crc32"][".bin"] == zlib.crc32(Path(f"{out}.bin").read_bytes())
    return identity_of(recipe(str(out)))


def recipe(train: object) -> SimpleNamespace:
    return SimpleNamespace(data=SimpleNamespace(train=train))


def goes_on(trained_on: list[dict] | None, data: list[dict], train: object = "x") -> bool:
    manifest = {"recipe": {"data": {"train": "before"}}}
    if trained_on is not None:
        manifest["data"] = json.loads(json.dumps(trained_on))
    try:
        refuse_other_data(manifest, data, recipe(train), "recipe.yaml", Path("run/iter_1"))
    except InputError:
        return False
    return True


def test_identity_follows_the_content_and_not_the_path(tmp_path, tokenizer):
    texts = [text(200, number) for number in range(60)]
    first = prepared(tmp_path, tokenizer, "first", texts)
    assert goes_on(first, first)
    assert goes_on(first, prepared(tmp_path, tokenizer, "copy", texts))
    assert not goes_on(first, prepared(tmp_path, tokenizer, "fewer", texts[:-1]))
    # As many tokens, in another order.
    swapped = [*texts[:30], texts[31], texts[30], *texts[32:]]
    assert not goes_on(first, prepared(tmp_path, tokenizer, "swapped", swapped))
    assert not goes_on(first, [*first, *first])
    assert not goes_on([*first, *first], first)
    assert not goes_on(first, [{**first[0], "weight": 2.0}])
    assert not goes_on(first, [{**first[0], "prompts": ["EP_2"]}])
    # One word of a document, of the same length in tokens: outside the blocks that are read, the manifest tells.
    data = Path(first[0]["prefix"] + ".bin")
    assert data.stat().st_size > 0
    assert not goes_on(first, [{**first[0], "crc32": {".bin": 1}}])
    assert goes_on(first, [{**first[0], "crc32": None}])


def test_a_checkpoint_without_a_record_of_its_data_goes_on_under_the_same_name_alone(tmp_path, tokenizer):
    data = prepared(tmp_path, tokenizer, "data", [text(50)])
    assert goes_on(None, data, "before")
    assert not goes_on(None, data, "other")
