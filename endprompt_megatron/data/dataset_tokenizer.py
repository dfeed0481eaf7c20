"""A dataset's token ids mean something to one tokenizer alone: is it the model's?"""

from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.indexed import path_of, read_manifest
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.fingerprint import FORMAT, checksum_of_files, fingerprint_of
from endprompt_megatron.tokenizer.tokenizer import TOKENIZER_MODEL

_KEY = "tokenizer_sha256"
_SHOWN = len(FORMAT) + 8


def refuse_other_tokenizer(blends: list[tuple[str, list[tuple]]], model: Path | str) -> None:
    """Raise InputError for a PREFIX of `blends` (key, [(PREFIX, ...)]) that another tokenizer than `model`'s made.

    `model` is the Hugging Face directory.  A dataset whose manifest names no tokenizer is let pass.
    """
    sums: dict[str, str] = {}
    for key, blend in blends:
        for prefix, *_ in blend:
            made_with = (read_manifest(prefix) or {}).get(_KEY)
            if made_with is None or _is_of(str(made_with), Path(model), sums):
                continue
            raise InputError(
                f"{key}={prefix} was prepared with another tokenizer ({str(made_with)[:_SHOWN]}) than that of "
                f"model.hf={model} ({sums['model'][:_SHOWN]}); prepare it again (tools/prepare_data.py --tokenizer "
                f"{model}){_for_old_sums(str(made_with), prefix)}"
            )


def _is_of(made_with: str, model: Path, sums: dict[str, str]) -> bool:
    """Whether a manifest's sum is one that the model's files have; `sums` keeps what was computed.

    A directory may hold the same vocabulary twice, as tokenizer.json and tokenizer.model: either is the model's.
    """
    own = model / TOKENIZER_MODEL
    twice = own.is_file()
    if not made_with.startswith(FORMAT) and made_with in {
        checksum_of_files(path) for path in [model, own][: 1 + twice]
    }:
        return True
    if "model" not in sums:
        sums["model"] = fingerprint_of(load_tokenizer(model))
    if made_with == sums["model"]:
        return True
    if twice and "own" not in sums:
        sums["own"] = fingerprint_of(load_tokenizer(own))
    return made_with == sums.get("own")


def _for_old_sums(made_with: str, prefix: str) -> str:
    if made_with.startswith(FORMAT):
        return ""
    return (
        f"; its sum is of an earlier form, over whole files: if the tokenizer is the model's all the same, take {_KEY} "
        f"out of {path_of(prefix, '.json')}"
    )
