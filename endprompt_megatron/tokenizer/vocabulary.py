"""Do the ids of a tokenizer have embeddings in a model?  Its files are read, no tokenizer is loaded."""

from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.tokenizer.tokenizer import LLAMA3_SPECIAL, TIKTOKEN, kind_of_model


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """Raise InputError if the tokenizer in `directory` (if any) has ids that the model has no embedding for."""
    for name, highest in _highest_ids(directory):
        if highest >= vocab_size:
            raise InputError(
                f"{directory / name}: token id {highest} is outside the model's vocabulary (config.json has "
                f"vocab_size={vocab_size}); use the tokenizer that belongs to the model"
            )


def _highest_ids(directory: Path) -> list[tuple[str, int]]:
    found = []
    if (directory / "tokenizer.json").is_file():
        value = read_json(directory / "tokenizer.json", "a tokenizer")
        model = value.get("model")
        vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
        # Unigram models keep a list of [piece, score], the others a map from piece to id.
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [token["id"] for token in value.get("added_tokens") or []]
        found.append(("tokenizer.json", max(ids, default=-1)))
    elif (directory / "vocab.json").is_file():
        found.append(("vocab.json", max(read_json(directory / "vocab.json", "a vocabulary").values(), default=-1)))
    elif (directory / "tokenizer.model").is_file():
        found.append(("tokenizer.model", _size_of_model(directory / "tokenizer.model") - 1))
    if (directory / "added_tokens.json").is_file():
        added = read_json(directory / "added_tokens.json", "added tokens")
        found.append(("added_tokens.json", max(added.values(), default=-1)))
    return found


def _size_of_model(path: Path) -> int:
    """Highest id + 1 of a `tokenizer.model`, LLaMA-3's special tokens included; 0 if it is neither of the two kinds."""
    if kind_of_model(path) == TIKTOKEN:
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip()) + LLAMA3_SPECIAL
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError):
        return 0
