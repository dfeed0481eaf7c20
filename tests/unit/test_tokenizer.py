"""Tokenizers: chosen by what a directory holds, no special tokens in texts, fingerprints, clear refusals."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from small import edit_json, small_sentencepiece, small_tokenizer, text
from unit.starting import write_tokens

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.compatibility import refuse_other_tokenizer
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.fingerprint import fingerprint_of


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), ["This is the end. End."] * 5)


def fingerprint(place: Path) -> str:
    return fingerprint_of(load_tokenizer(place))


def test_hugging_face_tokenizer(hf):
    tokenizer = load_tokenizer(hf)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 0, 1)
    assert tokenizer.convert("<|eot_id|>") == 2
    assert tokenizer.convert("nosuch") is None
    assert not tokenizer.starts_with_bos
    sentence = "the end — naïve <|eot_id|> 日本\r\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


def test_truncation_in_tokenizer_json_does_not_cut_texts(hf, tmp_path):
    for file in hf.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit_json(tmp_path / "tokenizer.json", truncation=truncation)
    assert load_tokenizer(tmp_path).encode(text(50)) == load_tokenizer(hf).encode(text(50))


def test_family_that_begins_with_bos_is_recognised(hf, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    for file in hf.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.starts_with_bos
    assert loaded.encode("the end") == load_tokenizer(hf).encode("the end")  # yet none is added unasked


def test_sentencepiece_tokenizer(sentencepiece_dir):
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(sentencepiece_dir)
    direct = SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    sentence = text(30, 3)
    assert tokenizer.encode(sentence) == direct.encode(sentence)
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (70, 1, 2)
    assert tokenizer.starts_with_bos
    assert load_tokenizer(sentencepiece_dir / "tokenizer.model").encode(sentence) == direct.encode(sentence)


def test_names_of_special_tokens_in_a_text_stay_text(hf):
    tokenizer = load_tokenizer(hf)
    ids = tokenizer.encode("the end<|eot_id|>")
    assert 2 not in ids
    assert ids == tokenizer.encode("the end") + tokenizer.encode("<|eot_id|>")
    assert tokenizer.encode_prompt("the end<|eot_id|>") == [*tokenizer.encode("the end"), 2]


def test_a_tokenizer_model_beside_a_configuration_is_read_by_its_own_library(sentencepiece_dir, tmp_path):
    copy = shutil.copytree(sentencepiece_dir, tmp_path / "copy")
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    sentence = f"  {text(10)}    {text(10)}"
    assert load_tokenizer(copy).encode(sentence) == load_tokenizer(sentencepiece_dir).encode(sentence)


def test_added_tokens_that_only_the_configuration_names_are_there(hf, tmp_path):
    copy = shutil.copytree(hf, tmp_path / "copy")
    token = {"content": "<think>", "special": False, "normalized": False, "lstrip": False, "rstrip": False}
    edit_json(copy / "tokenizer_config.json", added_tokens_decoder={"300": {**token, "single_word": False}})
    tokenizer = load_tokenizer(copy)
    assert (tokenizer.vocab_size, tokenizer.convert("<think>")) == (301, 300)
    assert 300 in tokenizer.encode("the<think>end")


# tiktoken instead of tokenizers, where it is the same


@pytest.fixture(scope="module")
def like_llama_3(tmp_path_factory) -> Path:
    """A tokenizer.json as transformers makes it of a tiktoken file, small."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    directory = tmp_path_factory.mktemp("like-llama-3")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator([text(2000), "  four    blanks"], trainer)
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = [b"%s %d" % (base64.b64encode(bytes(byte_of[c] for c in piece)), rank) for piece, rank in pieces]
    (directory / "ranks").write_bytes(b"\n".join(lines) + b"\n")
    backend = TikTokenConverter(str(directory / "ranks"), extra_special_tokens=["<bos>", "<eos>"]).converted()
    backend.save(str(directory / "tokenizer.json"))
    return directory


def _byte_characters() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(dict(sorted(bytes_to_unicode().items())).values())


def _without_a_merge(content: dict) -> None:
    del content["model"]["merges"][-1]


def _other_order(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[10], merges[40] = merges[40], merges[10]


def _strict(content: dict) -> None:
    content["model"]["ignore_merges"] = False


def _composed(content: dict) -> None:
    content["normalizer"] = {"type": "NFKC"}


def _other_pattern(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"


def _found_in_texts(content: dict) -> None:
    content["added_tokens"][0]["special"] = False


def _blank_before(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


CHANGES = [_without_a_merge, _other_order, _strict, _composed, _other_pattern, _found_in_texts, _blank_before]


@pytest.mark.parametrize("change", [None, *CHANGES], ids=lambda change: change.__name__ if change else "none")
def test_tiktoken_stands_in_only_for_what_it_does_alike(like_llama_3, tmp_path, change):
    from tokenizers import Tokenizer

    directory = shutil.copytree(like_llama_3, tmp_path / "copy")
    content = json.loads((directory / "tokenizer.json").read_text())
    if change is not None:
        change(content)
        (directory / "tokenizer.json").write_text(json.dumps(content))
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    reference.encode_special_tokens = True
    tokenizer = load_tokenizer(directory)
    for sample in (text(500, 1), "  four    blanks\n\n 12345 é e\u0301 ﬁ <bos>the<bos> they'd", "where" * 20, "a b"):
        assert tokenizer.encode(sample) == reference.encode(sample, add_special_tokens=False).ids
    assert (tokenizer._tiktoken is not None) == (change is None)
    assert (fingerprint(directory) == fingerprint(like_llama_3)) == (change is None)


# Fingerprints


def _json(name: str, **changes):
    return lambda directory: edit_json(directory / name, **changes)


def _saved_by_transformers(directory: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)


def _edited(change):
    def edit(directory: Path) -> None:
        content = json.loads((directory / "tokenizer.json").read_text())
        change(content)
        (directory / "tokenizer.json").write_text(json.dumps(content))

    return edit


def _swapped_ids(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def _beginning_with_bos(directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    begin = [("<|begin_of_text|>", 0)]
    tokenizer.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    tokenizer.save(str(directory / "tokenizer.json"))


COSMETIC = {
    "nothing": lambda directory: None,
    "a README": lambda directory: (directory / "README.md").write_text("not the tokenizer's"),
    "chat template": _json("tokenizer_config.json", chat_template="{{ messages }}"),
    "length and sides": _json("tokenizer_config.json", model_max_length=131072, padding_side="left"),
    "truncation": _json(
        "tokenizer.json", truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
    ),
    "saved by transformers": _saved_by_transformers,
}
OF_IDS = {
    "EOS": _json("tokenizer_config.json", eos_token="<|eot_id|>"),
    "BOS": _json("tokenizer_config.json", bos_token="<|eot_id|>"),
    "BOS before a text": _beginning_with_bos,
    "a merge": _edited(_without_a_merge),
    "order of merges": _edited(_other_order),
    "two ids": _edited(_swapped_ids),
    "normaliser": _edited(_composed),
    "added token found in texts": _edited(_found_in_texts),
}


@pytest.mark.parametrize("edit", COSMETIC)
def test_fingerprint_stays_where_the_ids_stay(hf, tmp_path, edit):
    copy = shutil.copytree(hf, tmp_path / "copy")
    COSMETIC[edit](copy)
    assert fingerprint(copy) == fingerprint(hf)


@pytest.mark.parametrize("edit", OF_IDS)
def test_fingerprint_changes_with_what_decides_the_ids(hf, tmp_path, edit):
    copy = shutil.copytree(hf, tmp_path / "copy")
    OF_IDS[edit](copy)
    assert fingerprint(copy) != fingerprint(hf)


def test_the_name_of_a_reserved_token_does_not_matter(like_llama_3, tmp_path):
    copy = shutil.copytree(like_llama_3, tmp_path / "copy")
    file = copy / "tokenizer.json"
    file.write_text(file.read_text().replace("<eos>", "<|reserved_special_token_7|>"))
    assert fingerprint(copy) == fingerprint(like_llama_3)


def test_sentencepiece_models_are_told_apart(sentencepiece_dir, hf, tmp_path):
    other = small_sentencepiece(tmp_path, ["zebra"] * 50)
    assert len({fingerprint(directory) for directory in (sentencepiece_dir, other, hf)}) == 3
    assert fingerprint(other) == fingerprint(other / "tokenizer.model")


# A dataset and the model it is for


def _dataset(prefix: Path, made_with: str | None) -> list:
    write_tokens(prefix, 100)
    if made_with is not None:
        Path(f"{prefix}.json").write_text(json.dumps({"tokenizer_sha256": made_with}))
    return [("data.train", str(prefix))]


def test_datasets_that_the_models_tokenizer_made_are_accepted(hf, sentencepiece_dir, tmp_path):
    both = shutil.copytree(hf, tmp_path / "both")
    shutil.copy(sentencepiece_dir / "tokenizer.model", both)
    for number, (made_with, model) in enumerate(
        [
            (None, hf),
            (fingerprint(hf), hf),
            (fingerprint(hf), both),
            (fingerprint(sentencepiece_dir), both),
        ]
    ):
        refuse_other_tokenizer(_dataset(tmp_path / f"data-{number}", made_with), model)


def test_datasets_that_another_tokenizer_made_are_refused(hf, sentencepiece_dir, tmp_path):
    made_with, own = fingerprint(sentencepiece_dir), fingerprint(hf)
    with pytest.raises(InputError) as refused:
        refuse_other_tokenizer(_dataset(tmp_path / "data", made_with), hf)
    message = str(refused.value)
    assert message.startswith(f"data.train={tmp_path / 'data'} was prepared with another tokenizer ({made_with[:13]})")
    assert f"model.hf={hf} ({own[:13]}); prepare it again" in message
    assert "\n" not in message


# What cannot be read


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": "{broken"}, "cannot be read"),
        ({"tokenizer.model": "IQ== 0\nIg== 1"}, "2 ranks where LLaMA-3's tokenizer.model has 128000"),
        ({"tokenizer.model": "IQ== 0\nIg==\n"}, "tokenizer.model:2: not a token in base64"),
        ({"tokenizer.model": ""}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, "cannot be read"),
    ],
)
def test_missing_and_broken_tokenizers_are_refused(tmp_path, content, needle):
    for name, value in content.items():
        (tmp_path / name).write_text(value)
    with pytest.raises(InputError) as refused:
        load_tokenizer(tmp_path)
    assert needle in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "absent")
