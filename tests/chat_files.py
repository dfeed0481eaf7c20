"""Chat templates as models have them, conversations, and how each would be written down by hand."""

import json
from pathlib import Path

from small import small_tokenizer, text

TURN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As LLaMA-3's: BOS before the first turn, contents trimmed.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# As LLaMA-2's and Mistral's: no turn has a header, and EOS ends the answers.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# CHATML with its answers marked.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# CHATML that describes tools before the first turn and writes calls, as Qwen2.5's does.
WRITES_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    '{% for call in message.tool_calls or [] %}{{ \'<tool_call>{"name": "\' + call.function.name }}'
    '{{ \'", "arguments": \' + '
    "call.function.arguments | tojson + '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "inst": INST, "marked": MARKED}


def chat_tokenizer(directory: Path, template: str | None = CHATML) -> Path:
    """A small real tokenizer whose turns have tokens, with that chat template."""
    from transformers import AutoTokenizer

    small_tokenizer(directory, 300)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", *TURN_TOKENS]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def conversations(count: int, seed: int = 0) -> list[list[dict]]:
    """`count` conversations of one to three exchanges, every third with a system turn; not all of it is ASCII."""
    made = []
    for number in range(count):
        turns = [{"role": "system", "content": "you are — é — it"}] if number % 3 == 0 else []
        for exchange in range(1 + number % 3):
            key = 1000 * seed + 10 * number + exchange
            turns.append({"role": "user", "content": text(3 + key % 7, key)})
            turns.append({"role": "assistant", "content": text(2 + key % 9, key + 5) + "\n\nand … so on" * (key % 2)})
        made.append(turns)
    return made


def by_hand(turns: list[dict], template: str) -> list[tuple[str, bool]]:
    """A conversation as (text, whether it is of an answer), part by part, without Jinja."""
    parts = [("<|begin_of_text|>", False)] if template in ("llama3", "inst") else []
    for turn in turns:
        answer = turn["role"] == "assistant"
        if template == "llama3":
            parts.append((f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n", False))
            parts.append((turn["content"].strip() + "<|eot_id|>", answer))
        elif template == "inst":
            parts.append(
                (f" {turn['content']}<|end_of_text|>" if answer else f"[INST] {turn['content']} [/INST]", answer)
            )
        else:
            parts.append((f"<|im_start|>{turn['role']}\n", False))
            parts.append((turn["content"] + "<|im_end|>", answer))
            parts.append(("\n", False))
    return parts


def write_chats(path: Path, made: list[list[dict]]) -> str:
    path.write_text("".join(json.dumps({"messages": turns, "id": 1}) + "\n" for turns in made), encoding="utf-8")
    return str(path)
