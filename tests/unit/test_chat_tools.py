"""Tool calls and contents in parts: one form of all, and what the chat template writes of it."""

import json

import pytest
from chat_files import CHATML, WRITES_TOOLS, chat_tokenizer
from unit.preparing import stored_documents

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus.chat_formats import conversation_of
from endprompt_megatron.data.corpus.prepare import prepare

CALLS = [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
WITH_TOOLS = [
    {"role": "system", "content": "be exact"},
    {"role": "user", "content": "1 and 2?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "yes"},
]


def as_openai_writes(messages: list[dict]) -> list[dict]:
    """Arguments as JSON in a text, null in the place of no content, contents in parts."""
    written = json.loads(json.dumps(messages))
    for call in written[2]["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    written[2]["content"] = None
    written[1]["content"] = [{"type": "text", "text": "1 and"}, {"type": "text", "text": " 2?"}]
    return written


def test_tool_turns_and_contents_in_parts_come_to_one_form():
    expected = {"messages": WITH_TOOLS, "tools": TOOLS}
    for messages in (WITH_TOOLS, as_openai_writes(WITH_TOOLS), json.dumps(WITH_TOOLS)):
        for tools in (TOOLS, json.dumps(TOOLS)):
            assert json.loads(conversation_of({"messages": messages, "tools": tools}, "auto")) == expected
    call = json.dumps({"name": "add", "arguments": {"a": 1, "b": [2]}})
    shared = [("system", "be exact"), ("human", "1 and 2?"), ("function_call", call), ("observation", "3")]
    shared += [("gpt", "It is 3.")]
    record = {"conversations": [{"from": name, "value": value} for name, value in shared]}
    found = json.loads(conversation_of(record, "auto"))
    assert [turn["role"] for turn in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2]["tool_calls"][0]["function"] == CALLS[0]["function"]


def test_tool_calls_are_written_and_learnt_as_the_template_has_them(tmp_path):
    from transformers import AutoTokenizer

    hf = chat_tokenizer(tmp_path / "hf", WRITES_TOOLS)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": as_openai_writes(WITH_TOOLS), "tools": TOOLS}) + "\n")
    prepare([str(path)], str(hf), str(tmp_path / "out"), chat="auto", workers=1)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = tokenizer.apply_chat_template(WITH_TOOLS, tools=TOOLS, return_dict=False)
    assert stored_documents(tmp_path / "out") == [ids]
    [mask] = stored_documents(tmp_path / "out.mask")
    answers = tokenizer.decode([token for token, answer in zip(ids, mask, strict=True) if answer])
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>'
    assert answers == f"{call}<|im_end|>It is 3.<|im_end|>yes<|im_end|>"
    out = str(tmp_path / "no")
    with pytest.raises(InputError, match=r"chats.jsonl:1: the chat template writes no tools"):
        prepare([str(path)], str(chat_tokenizer(tmp_path / "plain", CHATML)), out, chat="auto", workers=1)
