"""Conversations in the formats that instruction data comes in, all brought into one: [{"role", "content"}, ...].

    messages        {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}    OpenAI
    conversations   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}      ShareGPT
    alpaca          {"instruction": ..., "input": ..., "output": ...}
    prompt          {"prompt": ..., "response": ...}, or "completion" in place of "response"

A conversation may begin with a system turn; then user and assistant alternate, and the assistant speaks last.  An
assistant may call tools; the tools' turns follow, and then the assistant again.  A content in parts is their text.
Anything else is a Reject (rejects.py).  tokenizer/chat_template.py writes a conversation as text.
"""

from collections.abc import Iterable

import orjson

from endprompt_megatron.data.corpus.rejects import Reject

AUTO = "auto"
# By format: sets of keys; a record with all keys of one set has the format.
_KNOWN_BY: dict[str, tuple[set[str], ...]] = {
    "messages": ({"messages"},),
    "conversations": ({"conversations"},),
    "alpaca": ({"instruction", "output"},),
    "prompt": ({"prompt", "response"}, {"prompt", "completion"}),
}
FORMATS = tuple(_KNOWN_BY)
COLUMNS = (
    *("messages", "conversations", "instruction", "input", "output", "prompt", "response", "completion"),
    *("system", "tools"),
)

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
_ROLES = {
    **{"system": SYSTEM, "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT},
    **{"tool": TOOL, "function": TOOL, "observation": TOOL, "function_call": ASSISTANT},
}


def format_of(keys: Iterable[str], asked: str) -> str | Reject:
    """Which format a record with these keys has; `asked` is one of FORMATS, or AUTO."""
    there = set(keys)
    fits = [name for name, sets in _KNOWN_BY.items() if any(needed <= there for needed in sets)]
    if asked != AUTO:
        fits = [name for name in fits if name == asked]
    if len(fits) == 1:
        return fits[0]
    if fits:
        return Reject("ambiguous", f"could be {' or '.join(fits)}; --chat {fits[0]} or --chat {fits[1]} says which")
    wanted = " or ".join(" and ".join(sorted(needed)) for needed in _KNOWN_BY.get(asked, ()))
    found = f"keys {', '.join(sorted(there)[:8])}" if there else "no key"
    return Reject(
        "no_conversation",
        f"no conversation ({found}); expected {wanted or 'messages, conversations, instruction and output, or '}"
        f"{'' if wanted else 'prompt and response'}",
    )


def conversation_of(record: object, asked: str) -> str | Reject:
    """A record as JSON of its turns, the same bytes for the same conversation in any format; or a Reject.

    With tools, an object of messages and tools.  `asked`: the format, or AUTO.  A key that is null counts as absent.
    """
    if not isinstance(record, dict):
        return Reject("no_conversation", f"{type(record).__name__}, not an object with the keys of a conversation")
    record = {key: value for key, value in record.items() if value is not None}
    kind = format_of(record, asked)
    if isinstance(kind, Reject):
        return kind
    turns = _parsed(record[kind]) if kind in ("messages", "conversations") else _one_exchange(record, kind)
    if isinstance(turns, Reject):
        return turns
    if not isinstance(turns, list) or not turns:
        found = "no turn" if turns == [] else type(turns).__name__
        return Reject("empty_conversation", f"{kind!r} holds {found}; expected a list of turns")
    read = _turns(turns)
    if isinstance(read, Reject):
        return read
    system = record.get(SYSTEM)
    if system and read[0]["role"] != SYSTEM:
        if not isinstance(system, str):
            return Reject("not_text", f"'system' is {type(system).__name__}, not text")
        read.insert(0, {"role": SYSTEM, "content": system})
    tools = _parsed(record.get("tools"))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return Reject("not_text", f"'tools' is {type(tools).__name__}, not a list of the tools' descriptions")
    try:
        return orjson.dumps({"messages": read, "tools": tools} if tools else read).decode()
    except TypeError:  # "\ud800" in JSON is half a character
        return Reject("lone_surrogate", "lone surrogate in a turn; not valid text")


def _one_exchange(record: dict, kind: str) -> list[dict] | Reject:
    answer = "output" if kind == "alpaca" else "response" if "response" in record else "completion"
    asked = ("instruction", "input") if kind == "alpaca" else ("prompt",)
    for key in (*asked, answer):
        if not isinstance(record.get(key, ""), str):
            return Reject("not_text", f"{key!r} is {type(record[key]).__name__}, not text")
    question = "\n\n".join(record[key] for key in asked if record.get(key))
    return [{"role": USER, "content": question}, {"role": ASSISTANT, "content": record[answer]}]


def _turns(turns: list) -> list[dict] | Reject:
    """The turns under our names of roles, in order and complete; or a Reject."""
    read: list[dict] = []
    names: dict[str, str] = {}
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            return Reject("not_text", f"turn {number} is {type(turn).__name__}, not an object with role and content")
        said_by, said = ("from", "value") if "from" in turn else ("role", "content")
        name, content = turn.get(said_by), _text_of_parts(turn.get(said))
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            return Reject("unknown_role", f"turn {number} has {said_by}={name!r}; known are {', '.join(_ROLES)}")
        if names.setdefault(role if name != "function_call" else name, name) != name:
            return Reject("mixed_roles", f"turn {number} has {said_by}={name!r} where others have {names[role]!r}")
        calls = _calls(turn, content) if role == ASSISTANT else []
        if isinstance(calls, str):
            return Reject("bad_call", f"turn {number}: {calls}")
        if name == "function_call" or (calls and content is None):
            content = ""
        if not isinstance(content, str):
            return Reject("not_text", f"turn {number}: {said!r} is {_found(content)}, not text")
        if role in (USER, ASSISTANT) and not content.strip() and not calls:
            return Reject("empty_turn", f"turn {number}, the {role}'s, is empty")
        before = read[-1] if read else {"role": SYSTEM}
        if role not in _due(before) and not (role == SYSTEM and not read):
            due = " or the ".join(f"{each}'s" for each in _due(before))
            return Reject("wrong_turn", f"turn {number} is the {role}'s where the {due} should be")
        more = {"tool_calls": calls} if calls else {}
        more |= {key: turn[key] for key in ("name", "tool_call_id") if role == TOOL and isinstance(turn.get(key), str)}
        read.append({"role": role, "content": content, **more})
    if read[-1]["role"] != ASSISTANT:
        return Reject("no_answer", f"the last turn is the {read[-1]['role']}'s; there is no answer to learn from")
    return read


def _due(before: dict) -> tuple[str, ...]:
    """Whose turn it is after a turn."""
    if before["role"] == SYSTEM:
        return (USER,)
    if before["role"] == USER:
        return (ASSISTANT,)
    if before["role"] == TOOL:
        return (ASSISTANT, TOOL)
    return (TOOL,) if "tool_calls" in before else (USER,)


def _text_of_parts(content: object) -> object:
    """The text of a content in parts; what is no text stays as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _found(content: object) -> str:
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
        return f"parts ({', '.join(sorted({str(kind) for kind in kinds}))})"
    return "null or missing" if content is None else type(content).__name__


def _calls(turn: dict, content: object) -> list[dict] | str:
    """The tool calls of an assistant's turn in OpenAI's form, arguments as objects; or what is wrong with them."""
    given = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if turn.get("from") == "function_call":
        given = _parsed(content)
        given = given if isinstance(given, list) else [given]
    if not isinstance(given, list):
        return f"'tool_calls' is {type(given).__name__}, not a list"
    calls = []
    for call in given:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "a tool call has no name"
        # Templates write arguments as JSON, and want what is to be written: a text would get quotes around it.
        kept = {"function": {"name": function["name"], "arguments": _parsed(function.get("arguments", {}))}}
        identifier = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", **identifier, **kept})
    return calls


def _parsed(value: object) -> object:
    """JSON in a text as what it says; everything else, and a text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except ValueError:
        return value
