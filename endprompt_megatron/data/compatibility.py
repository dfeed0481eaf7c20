"""Whether a prepared dataset fits the model that is to be trained on it: tokenizer, chat template, vocabulary, kind.

Each check reads the dataset's manifest (PREFIX.json) and raises InputError.  What a manifest does not say is not
checked: another tool may have made the dataset.  `key` is the recipe's key that names the dataset.
"""

from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.indexed import CHAT, read_manifest
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.chat_template import digest_of_template
from endprompt_megatron.tokenizer.fingerprint import FORMAT, fingerprint_of
from endprompt_megatron.tokenizer.tokenizer import TOKENIZER_MODEL

_SHOWN = len(FORMAT) + 8  # characters of a fingerprint


def refuse_other_tokenizer(datasets: list[tuple[str, str]], model: Path | str) -> None:
    """Refuse a dataset of `datasets` (key, PREFIX) whose ids are those of another tokenizer than `model`'s.

    `model` is the Hugging Face directory.
    """
    own: dict[Path, str] = {}

    def fingerprint(place: Path) -> str:
        if place not in own:
            own[place] = fingerprint_of(load_tokenizer(place))
        return own[place]

    # A directory may hold the same vocabulary twice, as tokenizer.json and tokenizer.model: either is the model's.
    places = [Path(model), *(path for path in [Path(model) / TOKENIZER_MODEL] if path.is_file())]
    for key, prefix in datasets:
        made_with = (read_manifest(prefix) or {}).get("tokenizer_sha256")
        if made_with is None or any(made_with == fingerprint(place) for place in places):
            continue
        raise InputError(
            f"{key}={prefix} was prepared with another tokenizer ({str(made_with)[:_SHOWN]}) than that of "
            f"model.hf={model} ({fingerprint(places[0])[:_SHOWN]}); prepare it again (tools/prepare_data.py "
            f"--tokenizer {model})"
        )


def refuse_other_template(datasets: list[tuple[str, str]], model: Path | str) -> None:
    """Refuse conversations of `datasets` (key, PREFIX) that another chat template than `model`'s wrote.

    The exported model has the template of `model`, the Hugging Face directory, and users talk to it by that.
    """
    own: Any = getattr(load_tokenizer(model), "own_template", None)
    for key, prefix in datasets:
        manifest = read_manifest(prefix) or {}
        if manifest.get("kind") != CHAT:  # refuse_other_kind has a word for it
            continue
        if own is not None and manifest.get("chat_template_sha256") == digest_of_template(own):
            continue
        raise InputError(
            f"{key}={prefix}: model.hf={model} has {'no' if own is None else 'another'} chat template, and so would "
            "the exported model: put the template that the conversations were written with there, as "
            "chat_template.jinja, or prepare them again"
        )


def refuse_other_kind(key: str, prefix: Path | str, kind: str) -> None:
    """Refuse conversations where data.kind is "text", and texts where it is "chat"."""
    found = (read_manifest(prefix) or {}).get("kind", "text")
    if found != kind:
        held = {"text": "texts", CHAT: "conversations"}.get(found, found)
        remedy = f"set data.kind={found}" if kind == "text" else "prepare it with tools/prepare_data.py --chat"
        raise InputError(f"{key}={prefix} holds {held}, not what data.kind={kind} says; {remedy}")


def refuse_other_vocabulary(key: str, prefix: Path | str, vocab_size: int) -> None:
    """Refuse a dataset that may hold ids which a model with `vocab_size` tokens does not know."""
    manifest = read_manifest(prefix) or {}
    for name, offset in (("vocab_size", -1), ("max_token_id", 0)):
        value = manifest.get(name)
        if isinstance(value, int) and value + offset >= vocab_size:
            raise InputError(
                f"{key}={prefix}: {name}={value} in its manifest does not fit the model's vocabulary of {vocab_size}; "
                "prepare the data with the model's own tokenizer"
            )
