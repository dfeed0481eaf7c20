"""BOS, EOS and added tokens: those that transformers uses for a directory, whatever its main file is."""

import json
import shutil
from pathlib import Path

import pytest
from small import edit_json, run_tool, small_sentencepiece, small_tokenizer, text
from tokenizer_files import sentence_piece_as_hugging_face

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.fingerprint import fingerprint_of

TEXTS = ["the of and", "  the of", "the  of   and", "the\nof\n\nand", " the", "a b", "<pad>the</s>", ""]
PAD, SIZE = "<pad>", 300


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory with LLaMA-2's kind of tokenizer.model, and nothing else."""
    return small_sentencepiece(tmp_path_factory.mktemp("model"), TEXTS, SIZE, llama_2=True)


@pytest.fixture
def fast(model, tmp_path) -> Path:
    """The same as a tokenizer.json with tokenizer_config.json."""
    return sentence_piece_as_hugging_face(model / "tokenizer.model", tmp_path / "fast")


@pytest.fixture
def slow(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "slow"))


def write(directory: Path, **files: dict) -> Path:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def ends(directory: Path) -> tuple:
    tokenizer = load_tokenizer(directory)
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.starts_with_bos


WAYS_TO_PAD = {
    "added_tokens": lambda d: write(d, added_tokens={PAD: SIZE}),
    "added_tokens-and-role": lambda d: (
        write(d, added_tokens={PAD: SIZE}),
        edit_json(d / "tokenizer_config.json", pad_token=PAD),
    ),
    "special_tokens_map": lambda d: write(
        d, added_tokens={PAD: SIZE}, special_tokens_map={"pad_token": {"content": PAD, "lstrip": False}}
    ),
    "added_tokens_decoder": lambda d: edit_json(
        d / "tokenizer_config.json",
        added_tokens_decoder={str(SIZE): {"content": PAD, "special": True, "lstrip": False, "rstrip": False}},
        pad_token=PAD,
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_PAD)
def test_an_added_pad_token_changes_no_other_id(fast, model, way):
    WAYS_TO_PAD[way](fast)
    padded, plain = load_tokenizer(fast), load_tokenizer(model)
    texts = [each for each in TEXTS if PAD not in each]
    assert padded.encode_batch(texts) == plain.encode_batch(texts)
    assert padded.convert(PAD) == SIZE
    assert padded.vocab_size == SIZE + 1
    assert (padded.bos_id, padded.eos_id, padded.starts_with_bos) == (1, 2, True)
    assert SIZE in padded.encode_prompt("the" + PAD)
    # A token with a role is never found in a text, another is.
    assert (SIZE in padded.encode("the" + PAD)) == (way == "added_tokens")


def test_a_pad_token_with_a_role_leaves_the_fingerprint(fast, tmp_path):
    padded = shutil.copytree(fast, tmp_path / "padded")
    WAYS_TO_PAD["added_tokens_decoder"](padded)
    assert fingerprint_of(load_tokenizer(padded)) == fingerprint_of(load_tokenizer(fast))


def test_an_added_token_with_an_id_that_is_taken_or_leaves_a_gap_is_refused(fast):
    for identifier in (SIZE - 1, SIZE + 5):
        write(fast, added_tokens={PAD: identifier})
        with pytest.raises(InputError, match=f"'<pad>' has id {identifier} in added_tokens.json"):
            load_tokenizer(fast)


def test_code_that_a_directory_asks_for_is_not_needed_and_never_run(fast, model, tmp_path):
    ran = tmp_path / "ran"
    (fast / "tokenization_x.py").write_text(f"open({str(ran)!r}, 'w')\nclass XTokenizer: ...\n")
    auto_map = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    edit_json(fast / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="XTokenizer")
    assert ends(fast) == (1, 2, True)
    assert load_tokenizer(fast).encode_batch(TEXTS) == load_tokenizer(model).encode_batch(TEXTS)
    (fast / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        ends(fast)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, (1, 2, True)),
        ({"bos_token_id": 1, "eos_token_id": [2, 5]}, (1, 2, True)),
        ({"eos_token_id": 2}, (None, 2, False)),
        ({}, (None, None, False)),
        ({"bos_token_id": None, "eos_token_id": None}, (None, None, False)),
    ],
)
def test_config_json_says_how_documents_end_where_nothing_else_does(fast, config, expected):
    (fast / "tokenizer_config.json").unlink()
    assert ends(write(fast, config={"model_type": "llama", "vocab_size": SIZE, **config})) == expected


def test_tokenizer_config_has_priority_over_config_json(fast):
    assert ends(write(fast, config={"model_type": "llama", "bos_token_id": 7, "eos_token_id": 9})) == (1, 2, True)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1, 2, True)),
        ({"tokenizer_config": {"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}}, (1, 2, False)),
        ({"tokenizer_config": {"add_bos_token": True}}, (1, 2, True)),
        ({"tokenizer_config": {"bos_token": None}}, (None, 2, False)),
        ({"tokenizer_config": {"eos_token": None}}, (1, None, True)),
        ({"tokenizer_config": {"eos_token": {"content": "<s>", "lstrip": False}}}, (1, 1, True)),
        ({"special_tokens_map": {"eos_token": "<s>"}}, (1, 1, True)),
        ({"special_tokens_map": {"eos_token": "<s>"}, "tokenizer_config": {"eos_token": "</s>"}}, (1, 2, True)),
        ({"added_tokens": {"<|im_end|>": SIZE}, "tokenizer_config": {"eos_token": "<|im_end|>"}}, (1, SIZE, True)),
    ],
)
def test_files_beside_a_tokenizer_model_say_how_documents_begin_and_end(slow, files, expected):
    write(slow, **files)
    assert ends(slow) == expected
    # By itself the file has its own.
    assert ends(slow / "tokenizer.model") == (1, 2, True)


@pytest.mark.parametrize("config", [{"add_bos_token": False}, {"add_bos_token": True}, {}])
def test_ends_of_a_tokenizer_model_are_those_of_transformers(slow, config):
    from transformers import AutoTokenizer

    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(slow, tokenizer_config={**names, **config, "legacy": True})
    theirs = AutoTokenizer.from_pretrained(slow)
    begins = theirs("the").input_ids[0] == theirs.bos_token_id
    # transformers 5 begins with BOS only where the config says so; its slow class of version 4, where it says nothing.
    assert ends(slow) == (theirs.bos_token_id, theirs.eos_token_id, begins or not config)


def test_tokens_added_to_a_tokenizer_model_are_there(slow):
    write(
        slow,
        added_tokens={"<|im_start|>": SIZE, "<think>": SIZE + 1},
        special_tokens_map={"additional_special_tokens": ["<|im_start|>"]},
    )
    tokenizer = load_tokenizer(slow)
    assert tokenizer.vocab_size == SIZE + 2
    assert tokenizer.convert("<|im_start|>") == SIZE
    assert SIZE not in tokenizer.encode("<|im_start|>the")
    assert tokenizer.encode_prompt("<|im_start|>the")[0] == SIZE
    assert SIZE + 1 in tokenizer.encode("the<think>of")
    assert tokenizer.decode([SIZE, *tokenizer.encode("the of"), SIZE + 1]) == "<|im_start|>the of<think>"


def test_a_directory_that_names_no_end_of_documents_says_so(tmp_path):
    hf = small_tokenizer(tmp_path / "hf", 300)
    edit_json(hf / "tokenizer_config.json", eos_token=None)
    (tmp_path / "a.txt").write_text(text(20))
    arguments = ("--input", tmp_path / "a.txt", "--tokenizer", hf, "--out")
    run = run_tool("prepare_data", *arguments, tmp_path / "out")
    assert run.returncode == 0
    assert f"{hf}: neither the tokenizer nor a config.json names EOS" in run.stderr
    assert run_tool("prepare_data", *arguments, tmp_path / "wanted", "--no-eos").stderr == ""
