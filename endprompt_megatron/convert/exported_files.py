"""The small files of an exported model that training makes wrong: how long inputs may be, and where turns end."""

from pathlib import Path

from endprompt_megatron.common.files import read_json
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.model.shape import shape_of
from endprompt_megatron.tokenizer import load_tokenizer

_NO_LIMIT = 10**12  # transformers writes 10^30 where a tokenizer has no length


def exported_files(recipe: Recipe, config: dict, where: str) -> dict[str, dict]:
    """Contents of the files that differ from those in model.hf, by name; `config` is what is to be config.json.

    generation_config.json and tokenizer_config.json name the model's window where they name a shorter one.  A model
    fine-tuned on conversations ends its turns where its chat template does.  Raises InputError.
    """
    source, window = Path(recipe.model.hf), shape_of(config, where).window
    generation, tokenizer = (
        read_json(source / name, what) if (source / name).is_file() else {}
        for name, what in (
            ("generation_config.json", "a generation config"),
            ("tokenizer_config.json", "a tokenizer's configuration"),
        )
    )
    files = {"config.json": dict(config)}
    if recipe.data.kind == "chat":
        loaded = load_tokenizer(source)
        ends = [loaded.convert(token) for token in loaded.chat_template(str(source)).turn_ends()]
        known = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
        files["config.json"]["eos_token_id"] = generation["eos_token_id"] = _one_or_list(ends, known)
        files["generation_config.json"] = generation
    if _is_shorter(generation.get("max_length"), window):
        files["generation_config.json"] = {**generation, "max_length": window}
    if _is_shorter(tokenizer.get("model_max_length"), window):
        files["tokenizer_config.json"] = {**tokenizer, "model_max_length": window}
    return files


def _is_shorter(length: object, window: int) -> bool:
    # transformers' own default of max_length is 20, which is no window.
    return isinstance(length, int | float) and 20 < length < min(window, _NO_LIMIT)


def _ids(ends: object) -> list[int]:
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def _one_or_list(ends: list[int], known: list[int]) -> int | list[int]:
    """The ends of turns first, then what ended answers before."""
    every = list(dict.fromkeys([*ends, *known]))
    return every[0] if len(every) == 1 else every
