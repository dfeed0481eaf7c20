"""Conversations in the formats that instruction data comes in, all brought into one: [{"role", "content"}, ...].

    messages        {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}    OpenAI
    conversations   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}      ShareGPT
    alpaca          {"instruction": ..., "input": ..., "output": ...}
    prompt          {"prompt": ..., "response": ...}, or "completion" in place of "response"

A conversation may begin with a system turn; then user and assistant alternate, and the assistant speaks last.
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
COLUMNS = ("messages", "conversations", "instruction", "input", "output", "prompt", "response", "completion", "system")

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_ROLES = {"system": SYSTEM, "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT}


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

    `asked`: the format, or AUTO.  A key that is null counts as absent.
    """
    if not isinstance(record, dict):
        return Reject("no_conversation", f"{type(record).__name__}, not an object with the keys of a conversation")
    record = {key: value for key, value in record.items() if value is not None}
    kind = format_of(record, asked)
    if isinstance(kind, Reject):
        return kind
    turns = record[kind] if kind in ("messages", "conversations") else _one_exchange(record, kind)
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
    try:
        return orjson.dumps(read).decode()
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
        name, content = turn.get(said_by), turn.get(said)
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            return Reject("unknown_role", f"turn {number} has {said_by}={name!r}; known are {', '.join(_ROLES)}")
        if names.setdefault(role, name) != name:
            return Reject("mixed_roles", f"turn {number} has {said_by}={name!r} where others have {names[role]!r}")
        if turn.get("tool_calls") or turn.get("function_call"):
            return Reject("unknown_role", f"turn {number} calls a tool; tools are not supported")
        if not isinstance(content, str):
            found = "null or missing" if content is None else type(content).__name__
            return Reject("not_text", f"turn {number}: {said!r} is {found}, not text")
        if role != SYSTEM and not content.strip():
            return Reject("empty_turn", f"turn {number}, the {role}'s, is empty")
        begins = not read or read[-1]["role"] == SYSTEM
        due = USER if begins or read[-1]["role"] == ASSISTANT else ASSISTANT
        if role != due and not (role == SYSTEM and not read):
            return Reject("wrong_turn", f"turn {number} is the {role}'s where the {due}'s should be")
        read.append({"role": role, "content": content})
    if read[-1]["role"] != ASSISTANT:
        return Reject("no_answer", f"the last turn is the {read[-1]['role']}'s; there is no answer to learn from")
    return read
