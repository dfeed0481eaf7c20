"""Conversations as training data: their formats, the chat template, which tokens are answers, and what is stored."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from chat_files import (
    CHATML,
    INST,
    LLAMA3,
    MARKED,
    TEMPLATES,
    by_hand,
    chat_tokenizer,
    conversations,
    write_chats,
)
from small import assert_one_line_error, run_tool
from unit.preparing import stored_documents

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus.chat_formats import conversation_of
from endprompt_megatron.data.corpus.filters import Filters
from endprompt_megatron.data.corpus.prepare import prepare
from endprompt_megatron.data.corpus.rejects import Reject

FIVE = (".bin", ".idx", ".json", ".mask.bin", ".mask.idx")
TALK = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "he"}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: chat_tokenizer(root / name, template) for name, template in TEMPLATES.items()}


def five_files(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in FIVE]


def expected(turns: list[dict], template: str, tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a conversation written by hand, and 1 for every token with a byte of an answer."""
    parts = by_hand(turns, template)
    ids = tokenizer("".join(part for part, _ in parts), add_special_tokens=False).input_ids
    answers = np.concatenate([np.full(len(part.encode()), answer) for part, answer in parts])
    special = set(tokenizer.all_special_tokens)
    mask, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        # A piece of this kind of vocabulary has a character for each byte.
        length = len(token.encode()) if token in special else len(token)
        mask.append(int(answers[at : at + length].any()))
        at += length
    assert at == len(answers)
    return ids, mask


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_and_answers_of_a_conversation_equal_those_written_by_hand(tokenizers, tmp_path, template):
    from transformers import AutoTokenizer

    made = conversations(12)
    if template == "inst":
        made = [[turn for turn in turns if turn["role"] != "system"] for turns in made]
    files = [write_chats(tmp_path / "chats.jsonl", made)]
    manifest = prepare(files, str(tokenizers[template]), str(tmp_path / "out"), chat="auto", workers=1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[template])
    pairs = [expected(turns, template, tokenizer) for turns in made]
    assert stored_documents(tmp_path / "out") == [ids for ids, _ in pairs]
    assert stored_documents(tmp_path / "out.mask") == [mask for _, mask in pairs]
    assert manifest["kind"] == "chat"
    assert manifest["answer_tokens"] == sum(sum(mask) for _, mask in pairs)
    assert (manifest["bos"], manifest["eos"]) == (None, None)
    for turns, (ids, _) in zip(made, pairs, strict=True):
        assert tokenizer.apply_chat_template(turns, return_dict=False) == ids


def test_marked_answers_are_those_of_transformers(tokenizers, tmp_path):
    from transformers import AutoTokenizer

    made = conversations(9, seed=2)
    files = [write_chats(tmp_path / "chats.jsonl", made)]
    prepare(files, str(tokenizers["marked"]), str(tmp_path / "out"), chat="messages", workers=1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["marked"])
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    found = [tokenizer.apply_chat_template(turns, **options) for turns in made]
    assert stored_documents(tmp_path / "out") == [each["input_ids"] for each in found]
    assert stored_documents(tmp_path / "out.mask") == [each["assistant_masks"] for each in found]


def in_every_format(turns: list[dict]) -> dict[str, dict]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    question, answer = turns[-2]["content"], turns[-1]["content"]
    return {
        "messages": {"messages": turns, "source": "x"},
        "conversations": {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns]},
        "alpaca": {"instruction": question, "input": "", "output": answer},
        "response": {"prompt": question, "response": answer},
        "completion": {"prompt": question, "completion": answer, "messages": None},
    }


def test_every_chat_format_gives_the_same_conversation():
    for turns in conversations(4):
        records = in_every_format(turns)
        assert json.loads(conversation_of(records["messages"], "auto")) == turns
        assert conversation_of(records["conversations"], "auto") == conversation_of(records["messages"], "messages")
        for name in ("alpaca", "response", "completion"):
            assert json.loads(conversation_of(records[name], "auto")) == turns[-2:]
    record = {"system": "be kind", "instruction": "add", "input": "1 and 2", "output": "3"}
    assert json.loads(conversation_of(record, "alpaca")) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "add\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]


def turns(*pairs: tuple) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD = {
    "no-keys": ({"text": "a"}, "no_conversation", "keys text"),
    "not-an-object": ([1], "no_conversation", "list"),
    "two-formats": (
        {"messages": TALK, "prompt": "a", "response": "b"},
        "ambiguous",
        "--chat messages or --chat prompt",
    ),
    "empty": ({"messages": []}, "empty_conversation", "no turn"),
    "not-a-list": ({"messages": "who"}, "empty_conversation", "str"),
    "turn-is-text": ({"messages": ["who"]}, "not_text", "turn 1 is str"),
    "unknown-role": (turns(("user", "a"), ("critic", "b")), "unknown_role", "turn 2 has role='critic'"),
    "tool-unasked": (turns(("user", "a"), ("tool", "b"), ("assistant", "c")), "wrong_turn", "turn 2 is the tool's"),
    "mixed": (turns(("user", "a"), ("assistant", "b"), ("human", "c"), ("assistant", "d")), "mixed_roles", "turn 3"),
    "nameless-call": ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{}]}]}, "bad_call", "has no name"),
    "unanswered-call": (
        {"messages": [TALK[0], {**TALK[1], "tool_calls": [{"name": "f"}]}, TALK[0], TALK[1]]},
        "wrong_turn",
        "turn 3 is the user's where the tool's should be",
    ),
    "tools": ({"messages": TALK, "tools": 3}, "not_text", "'tools' is int"),
    "null": (turns(("user", "a"), ("assistant", None)), "not_text", "turn 2: 'content' is null"),
    "parts": (turns(("user", [{"type": "text"}]), ("assistant", "b")), "not_text", "turn 1: 'content' is parts"),
    "image": (turns(("user", [{"type": "image"}]), ("assistant", "b")), "not_text", "parts (image), not text"),
    "blank": (turns(("user", "a"), ("assistant", " \n")), "empty_turn", "turn 2"),
    "blank-alpaca": ({"instruction": "a", "output": ""}, "empty_turn", "turn 2"),
    "number": ({"prompt": 3, "response": "b"}, "not_text", "'prompt' is int"),
    "answer-first": (turns(("assistant", "a"), ("user", "b")), "wrong_turn", "turn 1 is the assistant's"),
    "twice": (turns(("user", "a"), ("user", "b"), ("assistant", "c")), "wrong_turn", "turn 2"),
    "late-system": (turns(("user", "a"), ("system", "b"), ("assistant", "c")), "wrong_turn", "turn 2"),
    "user-last": (turns(("user", "a"), ("assistant", "b"), ("user", "c")), "no_answer", "the user's"),
    "system-alone": (turns(("system", "a")), "no_answer", "the system's"),
    "surrogate": (turns(("user", "\ud800"), ("assistant", "b")), "lone_surrogate", "lone surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_records_that_are_no_conversation_are_rejected_with_a_reason(name):
    record, kind, needle = BAD[name]
    found = conversation_of(record, "auto")
    assert isinstance(found, Reject), found
    assert found.kind == kind
    assert needle in found.message


def test_bad_conversations_are_refused_with_their_place_or_skipped_and_counted(tokenizers, tmp_path):
    lines = [json.dumps({"messages": TALK}), "", "{", json.dumps(turns(("user", "a"))), json.dumps({"text": "b"})]
    lines += [json.dumps(turns(("user", "a <|im_end|> b"), ("assistant", "c"))), '{"messages": "\\ud800"}']
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([*lines, lines[0]]) + "\n")
    arguments = ["--input", path, "--tokenizer", tokenizers["chatml"], "--out", tmp_path / "out", "--chat"]
    assert_one_line_error(run_tool("prepare_data", *arguments), f"{path}:3: not JSON")
    assert not list(tmp_path.glob(".out*"))
    manifest = prepare([str(path)], str(tokenizers["chatml"]), str(tmp_path / "out"), chat="auto", skip_bad=True)
    skipped = manifest["skipped"]
    assert {kind: bad["count"] for kind, bad in skipped.items()} == dict.fromkeys(
        ("not_json", "no_answer", "no_conversation", "special_token", "empty_conversation"), 1
    )
    assert skipped["no_answer"]["first"] == [f"{path}:4: the last turn is the user's; there is no answer to learn from"]
    assert f"{path}:6: turn 1 contains '<|im_end|>'" in skipped["special_token"]["first"][0]
    assert len(stored_documents(tmp_path / "out")) == 2


def test_a_conversation_that_the_template_refuses_is_bad_input(tokenizers, tmp_path):
    files = [write_chats(tmp_path / "chats.jsonl", [TALK, *conversations(1)])]
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"chats.jsonl:2: the chat template refuses it \(only user and assistant\)"):
        prepare(files, str(tokenizers["inst"]), out, chat="auto", workers=1)
    manifest = prepare(files, str(tokenizers["inst"]), out, chat="auto", workers=1, skip_bad=True)
    assert manifest["skipped"]["template_refused"]["count"] == 1


UNFIT = {
    # Earlier answers are cut, as some reasoning models' templates do.
    "not-a-prefix": (
        CHATML.replace(
            "message['content'] +", "(message['content'] if loop.last or message['role'] == 'user' else 'cut') +"
        ),
        "up to and with turn 2 is not the beginning",
    ),
    "no-generation-prompt": (CHATML.partition("{% if add")[0], "does not lead up to the answer of turn 2"),
    "no-end": (CHATML.replace("<|im_end|>", "<|done|>"), "ends in", "would not learn to stop"),
    "mark-without-end": (
        MARKED.replace(" + '<|im_end|>' }}{% endgen", " }}{% endgen").replace("{% else", "{{ '<|im_end|>' }}{% else"),
        "would not learn to stop",
    ),
    "last-mark-alone": (
        MARKED.replace(
            "message['role'] == 'assistant' %}{% gen", "message['role'] == 'assistant' and loop.last %}{% gen"
        ),
        "marks 1 of 3 answers",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_template_without_recognisable_answers_is_refused_even_with_skip_bad(tokenizers, tmp_path, name):
    template, *needles = UNFIT[name]
    (tmp_path / "own.jinja").write_text(template)
    files = [write_chats(tmp_path / "chats.jsonl", conversations(3)[2:])]
    options = {"chat": "auto", "chat_template": str(tmp_path / "own.jinja"), "skip_bad": True, "workers": 1}
    with pytest.raises(InputError) as error:
        prepare(files, str(tokenizers["chatml"]), str(tmp_path / "out"), **options)
    for needle in (f"{files[0]}:1: the chat template does not fit", *needles):
        assert needle in str(error.value)


def test_a_tokenizer_without_a_chat_template_needs_a_template_file(tokenizers, tmp_path):
    bare = chat_tokenizer(tmp_path / "bare", None)
    files = [write_chats(tmp_path / "chats.jsonl", conversations(3))]
    own = tmp_path / "own.jinja"
    own.write_text("{% for x in messages %}")
    for file, line in (
        (None, "bare: the tokenizer has no chat template"),
        (str(own), "own.jinja: not a Jinja template"),
    ):
        with pytest.raises(InputError, match=line):
            prepare(files, str(bare), str(tmp_path / "out"), chat="auto", chat_template=file)
    own.write_text(CHATML)
    assert prepare(files, str(bare), str(tmp_path / "one"), chat="auto", chat_template=str(own), workers=1)
    assert prepare(files, str(tokenizers["chatml"]), str(tmp_path / "two"), chat="auto", workers=1)
    assert five_files(tmp_path / "one") == five_files(tmp_path / "two")


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["--chat", "--no-eos"], "--no-eos applies to texts"),
        (["--chat", "--text-field", "body"], "--text-field applies to texts"),
        (["--chat-template", "x"], "--chat-template x applies only with --chat"),
    ],
)
def test_options_for_texts_are_refused_with_chat(tmp_path, options, needle):
    arguments = ["--input", "chats.jsonl", "--tokenizer", "none", "--out", tmp_path / "out"]
    assert_one_line_error(run_tool("prepare_data", *arguments, *options), needle)


def test_chat_refuses_a_txt_and_a_missing_template_file(tokenizers, tmp_path):
    (tmp_path / "chats.txt").write_text("hello")
    tokenizer, out = str(tokenizers["chatml"]), str(tmp_path / "out")
    with pytest.raises(InputError, match=r"chats.txt: a text has no turns"):
        prepare([str(tmp_path / "chats.txt")], tokenizer, out, chat="auto")
    files = [write_chats(tmp_path / "chats.jsonl", [TALK])]
    with pytest.raises(InputError, match=r"--chat-template none.jinja: cannot be read"):
        prepare(files, tokenizer, out, chat="auto", chat_template="none.jinja")


def write_kinds(directory: Path, made: list[list[dict]]) -> list[str]:
    """The conversations as files of every kind, in four formats' order."""
    import pyarrow
    import pyarrow.parquet

    third = len(made) // 3
    files = [directory / name for name in ("one.jsonl", "two.jsonl.gz", "three.parquet")]
    write_chats(files[0], made[:third])
    with gzip.open(files[1], "wt", encoding="utf-8") as file:
        for turns in made[third : 2 * third]:
            file.write(json.dumps(in_every_format(turns)["conversations"], ensure_ascii=False) + "\n")
    table = pyarrow.table({"id": list(range(len(made) - 2 * third)), "messages": made[2 * third :]})
    pyarrow.parquet.write_table(table, files[2], row_group_size=3)
    return [str(file) for file in files]


def test_prepared_conversations_do_not_depend_on_workers_kinds_of_file_or_a_stop(tokenizers, tmp_path, monkeypatch):
    from endprompt_megatron.data.corpus import chunks, tokenise

    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 300)
    made = conversations(30)
    made += made[:5]
    options = {"chat": "auto", "filters": Filters(dedup=True, held_out=0.2)}
    tokenizer = str(tokenizers["llama3"])
    files = write_kinds(tmp_path, made)
    for workers in (1, 3):
        prepare(files, tokenizer, str(tmp_path / f"out{workers}"), workers=workers, **options)
    for suffix in ("", "-valid"):
        assert five_files(tmp_path / f"out1{suffix}") == five_files(tmp_path / f"out3{suffix}")
    both = stored_documents(tmp_path / "out1") + stored_documents(tmp_path / "out1-valid")
    assert len(both) == 30
    masks = stored_documents(tmp_path / "out1.mask") + stored_documents(tmp_path / "out1-valid.mask")
    assert [len(ids) for ids in both] == [len(mask) for mask in masks]

    # Stopped after each of its steps in turn, and gone on with.
    tokenise_chunk, calls = tokenise.tokenise_chunk, 0

    def stops(*arguments):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise KeyboardInterrupt
        return tokenise_chunk(*arguments)

    monkeypatch.setattr(tokenise, "tokenise_chunk", stops)
    stopped = 0
    while not Path(f"{tmp_path / 'again'}.json").exists():
        try:
            prepare(files, tokenizer, str(tmp_path / "again"), workers=1, **options)
        except KeyboardInterrupt:
            stopped += 1
    assert stopped > 2
    for suffix in ("", "-valid"):
        assert five_files(tmp_path / f"again{suffix}") == five_files(tmp_path / f"out1{suffix}")


def test_joining_that_stopped_between_tokens_and_mask_continues(tokenizers, tmp_path, monkeypatch):
    from endprompt_megatron.data.corpus import finish

    files, tokenizer = [write_chats(tmp_path / "chats.jsonl", conversations(10))], str(tokenizers["chatml"])
    prepare(files, tokenizer, str(tmp_path / "whole"), chat="auto", workers=1)
    write_idx = finish.write_idx

    def stops(*_):
        raise KeyboardInterrupt

    for function in ("_ones", "write_idx"):
        with monkeypatch.context() as patch:
            patch.setattr(finish, function, stops)
            with pytest.raises(KeyboardInterrupt):
                prepare(files, tokenizer, str(tmp_path / "out"), chat="auto", workers=1)
    assert finish.write_idx is write_idx
    prepare(files, tokenizer, str(tmp_path / "out"), chat="auto", workers=1)
    assert five_files(tmp_path / "out") == five_files(tmp_path / "whole")


def test_the_date_in_a_chat_template_is_always_the_same(tokenizers, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ strftime_now('%d %b %Y') }}" + LLAMA3)
    files = [write_chats(tmp_path / "chats.jsonl", [TALK])]
    tokenizer = tokenizers["llama3"]
    prepare(files, str(tokenizer), str(tmp_path / "out"), chat="auto", chat_template=str(own), workers=1)
    from transformers import AutoTokenizer

    [ids] = stored_documents(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tokenizer).decode(ids).startswith("26 Jul 2024<|begin_of_text|>")


def test_a_parquet_without_the_columns_of_a_conversation_is_refused(tokenizers, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(InputError, match=r"texts.parquet: no conversation \(keys text\)"):
        prepare([str(path)], str(tokenizers["chatml"]), str(tmp_path / "out"), chat="auto", workers=1)


def test_chat_requires_a_hugging_face_tokenizer(tmp_path):
    from small import small_sentencepiece

    files = [write_chats(tmp_path / "chats.jsonl", [TALK])]
    (tmp_path / "own.jinja").write_text(INST)
    options = {"chat": "auto", "chat_template": str(tmp_path / "own.jinja")}
    tokenizer = str(small_sentencepiece(tmp_path))
    with pytest.raises(InputError, match=r"need a Hugging Face tokenizer with a tokenizer\.json"):
        prepare(files, tokenizer, str(tmp_path / "out"), **options)
