"""A record as token ids, the way LongBench's pred.py does it: template, cut in the middle, chat template, tokens.

The prompt texts are the benchmark's and come with it, as `dataset2prompt.json`; digests in tasks.py tell whether
they are the published ones, and every summary says so.
"""

import hashlib
import string
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.evaluate.suites.longbench.longbench_data import Record
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import Task
from endprompt_megatron.tokenizer import Tokenizer

PROMPTS_FILE = "dataset2prompt.json"
_FIELDS = {"context", "input"}


def default_max_length(window: int) -> int:
    """Tokens of a prompt for a model's window, as `model2maxlen` has them: 3500 for 4K, 7500 for 8K, 31500 for 32K.

    What is left takes the longest answer (512 tokens) and a chat template.  Raises InputError for a window below 1024.
    """
    if window < 1024:
        raise InputError(f"LongBench: a window of {window} tokens is too small; answers take 512, use 1024 or more")
    return window // 1024 * 1000 - 500


def find_prompts(data: Path, prompts: Path | None) -> Path:
    """The file of prompt texts: the one given, otherwise beside the data.  Raises InputError if there is none."""
    if prompts is not None:
        return prompts
    directory = data.resolve() if data.is_dir() else data.resolve().parent
    places = [place / part for place in (directory, directory.parent) for part in ("", "config")]
    found = next((place / PROMPTS_FILE for place in places if (place / PROMPTS_FILE).is_file()), None)
    if found is None:
        raise InputError(
            f"{data}: no {PROMPTS_FILE} beside it; the prompt texts are LongBench's, take them from config/ of its "
            "repository (github.com/THUDM/LongBench, directory LongBench)"
        )
    return found


def read_prompts(file: Path, tasks: list[Task]) -> dict[str, str]:
    """Templates by task, with {context} and {input}.  Raises InputError for missing ones and unknown fields."""
    texts = read_json(file, "LongBench's prompts by task")
    for task in tasks:
        template = texts.get(task.name)
        if not isinstance(template, str):
            raise InputError(f"{file}: has no prompt for {task.name}; should hold one text a task")
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise InputError(
                f"{file}: the prompt for {task.name} cannot be read ({error}); double lone braces"
            ) from None
        if not fields <= _FIELDS:
            raise InputError(
                f"{file}: the prompt for {task.name} has the field {{{min(fields - _FIELDS)}}}; "
                "use {context} and {input}"
            )
    return {task.name: texts[task.name] for task in tasks}


def is_published(task: Task, template: str) -> bool:
    """Whether a template is the benchmark's, to the letter."""
    return hashlib.sha256(template.encode()).hexdigest()[:16] == task.prompt_checksum


def prompt_ids(
    tokenizer: Tokenizer, template: str, record: Record, max_length: int, wrapper: str | None
) -> tuple[list[int], bool]:
    """Token ids of a question, BOS included where the tokenizer puts one, and whether its middle was cut out.

    `wrapper`: a chat template as a text with {prompt} in it.  It comes after the cut, and adds to the length.
    """
    text = template.format(context=record.context, input=record.input)
    text, cut = cut_middle(tokenizer, text, max_length)
    if wrapper is not None:
        before, _, after = wrapper.partition("{prompt}")
        return _with_bos(tokenizer, _encode_chat(tokenizer, before + text + after)), cut
    return _with_bos(tokenizer, tokenizer.encode(text)), cut


def cut_middle(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[str, bool]:
    """The text, or its first and last max_length // 2 tokens as text where it has more than `max_length`.

    BOS counts as a token of the text and of its first half, as in the original, and is not part of the result.
    Encoded again, the two halves may give a few tokens more or less.
    """
    ids = _with_bos(tokenizer, tokenizer.encode(text))
    if len(ids) <= max_length:
        return text, False
    half = max_length // 2
    start = 1 if tokenizer.starts_with_bos else 0
    return tokenizer.decode(ids[start:half]) + tokenizer.decode(ids[-half:]), True


def chat_wrapper(directory: Path | str) -> str:
    """The chat template of a Hugging Face directory around one user message, as a text with {prompt} in it.

    BOS is left out: it is added with the tokens.  Raises InputError if the model has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not tokenizer.chat_template:
        raise InputError(f"{directory}: its tokenizer has no chat template; evaluate it as a base model")
    mark = "THE-PROMPT-STANDS-HERE"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    return text.removeprefix(tokenizer.bos_token or "").replace(mark, "{prompt}")


def _with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [tokenizer.bos_id, *ids] if tokenizer.starts_with_bos else ids


def _encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text whose special tokens are meant: a chat template's."""
    return tokenizer.encode_prompt(text)
