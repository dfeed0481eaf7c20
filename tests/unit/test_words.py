"""Cutting texts into words before they are tokenised changes no id, whatever the text."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_tokenizer, text
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from endprompt_megatron.data.corpus import words
from endprompt_megatron.data.corpus.encoders import WholeTexts
from endprompt_megatron.data.corpus.words import Words, cut_of
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.tokenizer import LLAMA3_PATTERN

DTYPE = np.dtype(np.uint16)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "smollm2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words._QWEN2), "isolated"), BYTES]),
}
# White space of every kind, what some call so, line ends, marks that combine, contractions, digits, special tokens.
ALPHABET = [
    *"aeimostZ'.,!-_<| 019²٣éñдя中ー。\u0301\u093f",
    *" \n\r\t\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u2029\u202f\u205f\u3000\ufeff",
    *("  ", "\n\n", "\r\n", " \n", "\n ", "'s", "'LL", " the", "the", "<|eot_id|>", "<|eot", "😀", "\u212b", "\u2001"),
]
ASCII = [character for character in ALPHABET if character.isascii()]
TEXTS = st.one_of(
    st.lists(st.sampled_from(ALPHABET) | st.characters(exclude_categories=["Cs"]), max_size=40).map("".join),
    st.lists(st.sampled_from(ASCII) | st.characters(max_codepoint=127), max_size=40).map("".join),
)


@pytest.fixture(scope="module", params=SPLITTERS)
def tokenizer(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("tokenizer"), SPLITTERS[request.param], request.param == "qwen2")


def made(directory, splitter, nfc=False, added=()):
    """A tokenizer with merges over letters, spaces and line ends, so that a wrong cut shows in the ids."""
    from tokenizers import models, trainers

    small_tokenizer(directory, 300)
    backend = Tokenizer(models.BPE(ignore_merges=not nfc))
    backend.pre_tokenizer = splitter
    backend.normalizer = normalizers.NFC() if nfc else None
    sample = ["\n\n\n  \t \r\n .\n\n !\n ... \n  the  'll 's x's  \xa0\xa0 中。\n 00 1 1.\r\n\r\n" * 9, text(900)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    backend.train_from_iterator(
        sample, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=specials)
    )
    backend.add_tokens(list(added))
    backend.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def both(tokenizer, texts):
    cut = cut_of(tokenizer)
    assert cut is not None
    return Words(cut, DTYPE).encode(texts), WholeTexts(tokenizer, DTYPE).encode(texts)


@settings(max_examples=700, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_word_wise_ids_are_those_of_complete_texts(tokenizer, texts):
    found, expected = both(tokenizer, texts)
    assert found == expected


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=3), limit=st.integers(1, 20))
def test_a_long_text_tokenised_in_stretches_gives_the_same_ids(tokenizer, texts, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "_LONG_TEXT", limit)
        found, expected = both(tokenizer, texts)
    assert found == expected


def test_special_token_names_are_text_in_another_process_too(tokenizer):
    sent = pickle.loads(pickle.dumps(cut_of(tokenizer)))
    texts = ["the end <|eot_id|> is not <|end_of_text|>\n", "<|begin_of_text|>the 00", "x<|eot_id|>"]
    whole = WholeTexts(tokenizer, DTYPE).encode(texts)
    assert Words(sent, DTYPE).encode(texts) == whole
    specials = {tokenizer.convert(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")}
    assert not specials & set(np.frombuffer(b"".join(whole), DTYPE).tolist())


def test_forgetting_known_words_changes_no_ids(tokenizer, monkeypatch):
    texts = [text(200, seed) for seed in range(20)]
    monkeypatch.setattr(words, "_MAX_BYTES", 1000)
    encoder = Words(cut_of(tokenizer), DTYPE)
    for batch in (texts[:10], texts[10:], texts):
        assert encoder.encode(batch) == WholeTexts(tokenizer, DTYPE).encode(batch)
        assert encoder._bytes < 200_000


@pytest.mark.parametrize(
    "splitter",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+"), "isolated"), BYTES]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "removed"), BYTES]),
        BYTES,
    ],
)
def test_texts_of_an_unknown_kind_of_tokenizer_are_not_cut(tmp_path, splitter):
    assert cut_of(made(tmp_path, splitter)) is None


@pytest.mark.parametrize(
    "token", [AddedToken("a b"), AddedToken("<x>", lstrip=True), AddedToken("<x>", single_word=True)]
)
def test_added_tokens_that_could_cross_a_cut_forbid_cutting(tmp_path, token):
    assert cut_of(made(tmp_path, SPLITTERS["llama3"], added=[token])) is None
    assert cut_of(made(tmp_path, SPLITTERS["llama3"], added=[AddedToken("<|python_tag|>")])) is not None
