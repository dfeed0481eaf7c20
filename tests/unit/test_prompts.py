"""End prompts: the published texts, the same ids as the libraries give, clear refusals."""

from pathlib import Path

import pytest
from small import small_sentencepiece, small_tokenizer

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.method.prompts import PROMPTS, tokenise_prompts
from endprompt_megatron.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), list(PROMPTS.values()) * 5)


def test_published_prompts_have_their_texts():
    assert PROMPTS == {
        "EP_1": "This is the end of text, please pay attention here",
        "EP_2": "<|eot_id|>",
        "EP_3": "End.",
    }


def test_prompts_are_what_transformers_gives_without_special_tokens(hf):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    names = ["EP_3", "EP_1", "EP_2", "text:Over and out", "text:Over<|eot_id|>"]
    texts = ["End.", PROMPTS["EP_1"], "<|eot_id|>", "Over and out", "Over<|eot_id|>"]
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
