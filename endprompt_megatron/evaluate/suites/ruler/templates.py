"""A task's words in a model's words: the base template, NVIDIA's chat templates by name, or the tokenizer's own.

The answer prefix stands after the chat template, at the start of the assistant's turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import Task

BASE, CHAT = "base", "chat"
# Before and after the task's text, as NVIDIA/RULER has them (Apache-2.0).
NAMED = {
    BASE: ("", ""),
    "meta-chat": ("[INST] ", " [/INST]"),
    "vicuna-chat": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: ",
        " ASSISTANT:",
    ),
    "lwm-chat": ("You are a helpful assistant. USER: ", " ASSISTANT: "),
    "command-r-chat": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "chatglm-chat": ("[gMASK]sop<|user|> \n ", "<|assistant|> \n "),
    "RWKV": (
        "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full response in full details. "
        "Please feel free to ask any question and I will always answer it\n\nUser: ",
        "\n\nAssistant:",
    ),
    "Phi3": ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
    "meta-llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "jamba": (
        "<|startoftext|><|bom|><|system|> <|eom|><|bom|><|user|> ",
        "<|eom|><|bom|><|assistant|>",
    ),
    "nemotron5-instruct": ("<SPECIAL_10>System\n\n<SPECIAL_11>User\n", "\n<SPECIAL_11>Assistant\n"),
}


@dataclass(frozen=True)
class Template:
    """What stands around a task's text.  `altered`: tasks that reword themselves reword this as well."""

    before: str
    after: str
    altered: bool

    @property
    def plain(self) -> bool:
        """Whether there is nothing around the text, so that no name in it stands for a special token."""
        return not (self.before or self.after)

    def of(self, task: Task, reword: Callable[[str], str] = lambda text: text) -> str:
        """The whole prompt with the task's fields in braces."""
        around = reword if self.altered else lambda text: text
        before, after = (around(part.replace("{", "{{").replace("}", "}}")) for part in (self.before, self.after))
        return before + reword(task.question) + after + reword(task.answer_prefix)


def template(name: str, model: Path | str | None = None) -> Template:
    """The template of that name; `chat` is that of the tokenizer in `model`, a Hugging Face directory.

    Raises InputError for an unknown name, or if the tokenizer has no chat template.
    """
    if name in NAMED:
        # NVIDIA rewords its chat templates with the task: "You is a helpful assistant" is what published scores saw.
        return Template(*NAMED[name], altered=True)
    if name != CHAT:
        raise InputError(f"--ruler-template {name}: unknown; use {CHAT} (the model's own), or {', '.join(NAMED)}")
    if model is None:
        raise InputError(f"--template {name}: needs the model's directory, whose chat template it is")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        if not tokenizer.chat_template:
            raise InputError(f"--template {name}: the tokenizer in {model} has no chat template; use {BASE}")
        mark = "THE-TASK"
        turns = [{"role": "user", "content": mark}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except InputError:
        raise
    except Exception as error:  # files that cannot be read, and whatever a template raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--template {name}: the chat template in {model} cannot be used ({reason})") from None
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise InputError(f"--template {name}: the chat template in {model} does not hold the user's text once")
    return Template(before, after, altered=False)
