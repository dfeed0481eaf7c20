"""End prompts and tokenizers: the published texts, the same ids as the libraries give, clear refusals."""

import io
from pathlib import Path

import pytest
from small import edit_json, small_tokenizer, text

from endprompt_megatron.errors import InputError
from endprompt_megatron.prompts import PROMPTS, tokenise_prompts
from endprompt_megatron.tokenizer import fingerprint, load_tokenizer


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory) -> Path:
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentences = [text(40, seed) for seed in range(40)] + list(PROMPTS.values()) * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=70, minloglevel=3, byte_fallback=False
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def test_the_published_prompts():
    assert PROMPTS == {
        "EP_1": "This is the end of text, please pay attention here",
        "EP_2": "<|eot_id|>",
        "EP_3": "End.",
    }


def test_prompts_are_what_transformers_gives_without_special_tokens(hf):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    names = ["EP_3", "EP_1", "EP_2", "text:Over and out"]
    texts = ["End.", PROMPTS["EP_1"], "<|eot_id|>", "Over and out"]
    expected = [tokenizer.encode(piece, add_special_tokens=False) for piece in texts]
    assert tokenise_prompts(hf, names) == expected
    assert len(tokenise_prompts(hf, ["EP_2"])[0]) == 1


def test_ep_2_falls_back_to_end_of_sequence(sentencepiece_dir):
    assert tokenise_prompts(sentencepiece_dir, ["EP_2"]) == [[load_tokenizer(sentencepiece_dir).eos_id]]


@pytest.mark.parametrize(
    ("names", "needle"), [([], "context.prompts=[]"), (["EP_9"], "context.prompts=EP_9"), (["text:"], "no token")]
)
def test_unusable_prompts_are_refused(hf, names, needle):
    with pytest.raises(InputError) as refused:
        tokenise_prompts(hf, names)
    assert needle in str(refused.value)


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


def test_fingerprint_follows_the_contents(hf, sentencepiece_dir, tmp_path):
    for file in hf.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text("not the tokenizer's")
    assert fingerprint(tmp_path) == fingerprint(hf) != fingerprint(sentencepiece_dir)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|eot_id|>")
    assert fingerprint(tmp_path) != fingerprint(hf)


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": "{broken"}, "cannot be read"),
        ({"tokenizer.model": "IQ== 0\nIg== 1"}, "is it SentencePiece?"),
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
