"""The study's text: what is asked can be known from what was told, and only from there."""

import random
import re
import sys

import pytest
import torch
from small import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "study"))
import corpus
import prepare


def test_study_corpus_queries_only_stated_facts_and_answers_the_last_statement():
    text = corpus.document(random.Random(3), 8192, 1920, 0.2)
    told, asked, values = {}, 0, set(corpus.words()["values"])
    for sentence in text.split("."):
        kind, *rest = sentence.split() or [""]
        if kind == "note":
            told[rest[0]] = rest[1]
        elif kind == "ask":
            assert told[rest[0]] == rest[1]
            assert rest[1] in values
            asked += 1
    assert asked > 100


def test_study_corpus_queries_stand_near_and_as_far_as_requested():
    words = re.findall(r"\w+|\.", corpus.document(random.Random(4), 16384, 1920, 0.2))
    told, distances = {}, []
    for at, word in enumerate(words):
        if word == "note":
            told[words[at + 1]] = at
        elif word == "ask":
            distances.append(at - told[words[at + 1]])
    assert min(distances) < 32
    assert max(distances) > 1000
    # Log-uniform between 8 and 1,920: half of them nearer than their geometric mean, 124.
    assert 0.35 < sum(distance < 124 for distance in distances) / len(distances) < 0.65


@pytest.mark.parametrize("keys", [4, 8])
def test_study_corpus_drill_repeats_its_pairs(keys):
    said = corpus.drill(random.Random(5), 2000, keys).split()
    pairs = list(zip(said[::2], said[1::2], strict=True))
    known, unknown = {}, 0
    for key, value in pairs:
        unknown += known.get(key) != value
        known[key] = value
    assert len(pairs) == 1000
    assert unknown < 60
    assert set(known) <= set(corpus.words()["keys"])


def test_study_corpus_has_no_word_of_two_kinds():
    every = corpus.every_word()
    assert len(every) == len(set(every))


def test_study_corpus_document_is_a_function_of_its_seed():
    write = (corpus.document, 512, 200, 0.6)
    assert list(corpus.documents(2, 1, *write)) == list(corpus.documents(2, 1, *write))
    assert list(corpus.documents(2, 1, *write)) != list(corpus.documents(2, 2, *write))


def test_first_layer_of_the_untaught_study_model_prefers_the_previous_token():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=prepare.VOCABULARY, attn_implementation="eager", **prepare.MODEL))
    prepare.easy_to_teach(model)
    tokens = torch.randperm(prepare.VOCABULARY)[:64][None]
    with torch.no_grad():
        seen = model(tokens, attention_mask=torch.ones_like(tokens), output_attentions=True).attentions
    rows = torch.arange(8, 64)
    back = [seen[0][0, :, rows, rows - offset].mean().item() for offset in range(8)]
    assert back[1] > 1.1 * max(back[2:])  # a token itself resembles its query more than any other
