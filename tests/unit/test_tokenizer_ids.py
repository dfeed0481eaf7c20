"""Real tokenizers give the ids of their reference implementations on a text in many scripts."""

import random
import shutil
from pathlib import Path

import pytest
from tokenizer_files import (
    LLAMA,
    LLAMA_3,
    LLAMA_4,
    MISTRAL,
    SENTENCE_PIECE,
    llama_3_as_hugging_face,
    llama_3_reference,
    sentence_piece_as_hugging_face,
    take,
)

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.fingerprint import fingerprint_of
from endprompt_megatron.tokenizer.vocabulary import check_vocabulary

TEXT = Path(__file__).with_name("multilingual.txt").read_bytes().decode()
# The whole, its lines, and pieces that begin and end anywhere, in the middle of words, blanks and emoji.
_DRAWN = [random.Random(0).randrange(len(TEXT)) for _ in range(300)]
TEXTS = [TEXT, *TEXT.splitlines(keepends=True), *TEXT.split("\n"), *(TEXT[at : at + 100] for at in _DRAWN), "", " "]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def reference(place):
    return llama_3_reference(place)


@pytest.fixture(scope="module")
def converted(place, reference) -> Path:
    names = sorted(reference.special_tokens, key=reference.special_tokens.get)
    return llama_3_as_hugging_face(place / LLAMA_3, place / "llama-3", names)


@pytest.fixture(scope="module")
def llama_3(place, reference):
    return load_tokenizer(place / LLAMA_3)


@pytest.fixture(scope="module")
def llama_3_from_json(converted):
    return load_tokenizer(converted)


@pytest.fixture(scope="module", params=SENTENCE_PIECE, ids=lambda pieces: f"{pieces}-pieces")
def sentence_piece(request, place) -> Path:
    """A directory that holds the model as tokenizer.model and nothing else."""
    take(MISTRAL, place, SENTENCE_PIECE[request.param])
    directory = place / f"sentencepiece-{request.param}"
    directory.mkdir()
    shutil.copy(place / SENTENCE_PIECE[request.param], directory / "tokenizer.model")
    return directory


def test_llama_3_gives_the_ids_of_its_own_tokenizer(llama_3, reference):
    tokenizer = llama_3
    assert tokenizer.encode_batch(TEXTS) == [reference.encode(text, bos=False, eos=False) for text in TEXTS]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128001, 128256)
    assert reference.encode("a", bos=True, eos=True) == [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]
    assert tokenizer.starts_with_bos
    assert {name: tokenizer.convert(name) for name in reference.special_tokens} == reference.special_tokens
    assert tokenizer.convert("<|eot_id|>") == reference.eot_id == 128009
    assert tokenizer.convert("the") == reference.encode("the", bos=False, eos=False)[0]


@pytest.mark.parametrize("length", [25_000, 25_001, 50_001, 400_000, 400_001, 825_010])
def test_llama_3_cuts_long_texts_and_runs_as_its_own_tokenizer(llama_3, reference, length):
    long = (TEXT * (length // len(TEXT) + 1))[:length]
    runs = [character * length for character in (" ", "a", ".", "\n", "中")]
    for text in [long, *runs, *(f"so {run} it" for run in runs), "a" * 12_500 + " " * length + "b" * length + "\t"]:
        assert llama_3.encode(text) == reference.encode(text, bos=False, eos=False)


def test_llama_3_gives_the_ids_of_its_conversion_by_transformers(llama_3, llama_3_from_json, converted):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(converted)
    expected = [theirs.encode(text, add_special_tokens=False, split_special_tokens=True) for text in TEXTS]
    assert llama_3.encode_batch(TEXTS) == expected
    tokenizer = llama_3_from_json
    assert tokenizer.encode_batch(TEXTS) == expected
    assert tokenizer.decode(expected[0]) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128001, 128256)
    assert tokenizer.starts_with_bos


def test_a_hugging_face_tokenizer_does_not_cut_long_runs(converted, llama_3_from_json):
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(converted / "tokenizer.json"))
    for text in (" " * 200_000 + "x", "so " + "." * 60_000, TEXT * 30):
        theirs.encode_special_tokens = True
        assert llama_3_from_json.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_names_of_special_tokens_in_a_text_stay_text(reference, llama_3, llama_3_from_json):
    text = "a<|eot_id|>b</s><s> <|end_of_text|>"
    plain = reference.encode(text, bos=False, eos=False)
    assert max(plain) < 128000
    for tokenizer in (llama_3, llama_3_from_json):
        assert tokenizer.encode(text) == plain
        prompt = tokenizer.encode_prompt("End.<|eot_id|>")
        assert prompt == reference.encode("End.<|eot_id|>", bos=False, eos=False, allowed_special="all")
        assert prompt[-1] == 128009
        assert tokenizer.encode(text) == plain  # a prompt changes nothing for what comes after


def test_sentencepiece_gives_the_ids_of_sentencepiece(sentence_piece):
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(sentence_piece / "tokenizer.model"))
    tokenizer = load_tokenizer(sentence_piece)
    assert tokenizer.encode_batch(TEXTS) == [reference.encode(text) for text in TEXTS]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.starts_with_bos) == (1, 2, True)
    assert reference.encode("a", add_bos=True, add_eos=True) == [1, *tokenizer.encode("a"), 2]
    assert not {1, 2} & set(tokenizer.encode(TEXT))


def test_sentencepiece_as_published_in_tokenizer_json_gives_the_same_ids(sentence_piece):
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(sentence_piece / "tokenizer.model"))
    directory = sentence_piece_as_hugging_face(sentence_piece / "tokenizer.model", sentence_piece / "hf")
    shutil.copy(sentence_piece / "tokenizer.model", directory)
    tokenizer = load_tokenizer(directory)
    assert type(tokenizer).__name__ == "HuggingFace"  # where both are, it is tokenizer.json's
    assert tokenizer.encode_batch(TEXTS) == [reference.encode(text) for text in TEXTS]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.starts_with_bos) == (1, 2, True)


def test_transformers_agrees_with_sentencepiece_where_no_run_of_blanks_is(sentence_piece):
    """LlamaTokenizer, built from the same file, as the second reference: it differs in runs of blanks alone."""
    from transformers import LlamaTokenizerFast

    theirs, tokenizer = LlamaTokenizerFast.from_pretrained(sentence_piece), load_tokenizer(sentence_piece)
    lines = [line for line in TEXT.split("\n") if line and "  " not in f" {line}".replace("▁", " ")]
    assert len(lines) > 90
    for line in lines:
        expected = theirs.encode(line, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.encode(line) == expected, line


def test_the_same_vocabulary_in_two_forms_has_one_fingerprint(llama_3, llama_3_from_json):
    assert fingerprint_of(llama_3) == fingerprint_of(llama_3_from_json)


def test_a_tiktoken_file_of_another_model_is_refused(tmp_path):
    take(LLAMA, tmp_path, LLAMA_4)
    with pytest.raises(InputError, match=r"ranks where LLaMA-3's tokenizer\.model has 128000"):
        load_tokenizer(tmp_path / LLAMA_4)


def test_the_highest_id_of_a_tiktoken_file_must_be_in_the_vocabulary(place, reference):
    directory = (place / LLAMA_3).parent
    check_vocabulary(directory, 128256)
    with pytest.raises(InputError, match="token id 128255 is outside the model's vocabulary"):
        check_vocabulary(directory, 128255)
