"""The directories of a Megatron-side checkpoint, and the files that travel in it.  No torch.

    DIR/iter_0000100/                  one checkpoint: the files of megatron.core.dist_checkpointing, and
    DIR/iter_0000100/hf/               config.json to export, generation config, tokenizer files
    DIR/iter_0000100/endprompt.json    the manifest, written last: without it the checkpoint is incomplete
    DIR/latest_checkpointed_iteration.txt

The converter and the trainer use the same functions.
"""

import json
import re
import shutil
import zlib
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, write_json, write_text
from endprompt_megatron.common.units import format_bytes
from endprompt_megatron.model.shape import ModelShape

MANIFEST = "endprompt.json"
HF_DIRECTORY = "hf"
LATEST = "latest_checkpointed_iteration.txt"
FORMAT = 1
DTYPES = ("bfloat16", "float16", "float32")
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_dir(root: Path, iteration: int) -> Path:
    """Directory of one checkpoint under `root`."""
    return root / f"iter_{iteration:07d}"


def complete_iterations(root: Path) -> list[int]:
    """Iterations whose checkpoint is complete, oldest first.  Empty if `root` does not exist."""
    if not root.is_dir():
        return []
    found = (_ITERATION.fullmatch(entry.name) for entry in root.iterdir() if (entry / MANIFEST).is_file())
    return sorted(int(match.group(1)) for match in found if match)


def newest_iteration(root: Path) -> int | None:
    """The newest complete iteration under `root`; None if there is none."""
    return max(complete_iterations(root), default=None)


def find_checkpoint(directory: Path, iteration: int | None = None, flag: str = "--megatron") -> Path:
    """The iter_ directory that the user means: `directory` itself, or the iteration under it (default: newest).

    Raises InputError if there is no complete checkpoint, or not that iteration.
    """
    if not directory.is_dir():
        raise InputError(f"{flag} {directory}: no such directory; expected a Megatron-Core checkpoint")
    if (directory / "checkpoints").is_dir() and not complete_iterations(directory):
        directory = directory / "checkpoints"  # RUN, as it stands in the recipe
    own = _ITERATION.fullmatch(directory.resolve().name)
    if own:
        if not (directory / MANIFEST).is_file():
            raise InputError(
                f"{flag} {directory}: incomplete checkpoint, {MANIFEST} is missing; choose another iteration"
            )
        if iteration is not None and iteration != int(own.group(1)):
            raise InputError(
                f"--iteration {iteration}: {flag} {directory} is another iteration's directory; give only one of them"
            )
        return directory
    complete = complete_iterations(directory)
    if not complete:
        if is_hugging_face(directory):
            raise InputError(f"{flag} {directory}: holds no complete checkpoint, but a Hugging Face model")
        raise InputError(f"{flag} {directory}: holds no complete checkpoint (iter_*/{MANIFEST})")
    if iteration is None:
        return iteration_dir(directory, complete[-1])
    if iteration not in complete:
        known = ", ".join(map(str, complete[-8:]))
        raise InputError(f"--iteration {iteration}: not a complete checkpoint of {directory}; it holds {known}")
    return iteration_dir(directory, iteration)


def write_manifest(
    directory: Path,
    *,
    step: int,
    consumed_samples: int,
    recipe: dict | None,
    vocab_size: int,
    dtype: str,
    source: str,
    files: dict[str, dict],
    data: list[dict] | None = None,
    base: dict | None = None,
) -> None:
    """Declare the checkpoint in `directory` complete.  `dtype` ("bfloat16") is what an export is written in.

    `files`: bytes and CRC-32 of every other file, by name.  `data`: what was trained on (data/samples/identity.py).
    `base`: whose weights are not here (convert/over_base.py).
    """
    manifest = {
        "format": FORMAT,
        "step": step,
        "consumed_samples": consumed_samples,
        "recipe": recipe,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "source": source,
        "files": files,
        **({} if data is None else {"data": data}),
        **({} if base is None else {"base": base}),
    }
    write_json(directory / MANIFEST, {**manifest, "crc32": _own_crc32(manifest)})


def _own_crc32(manifest: dict) -> int:
    """CRC-32 of everything else in a manifest."""
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read_manifest(directory: Path) -> dict:
    """The manifest of an iter_ directory.  Raises InputError if it is missing, broken or of another format."""
    path = directory / MANIFEST
    manifest = read_json(path, "the manifest of a checkpoint")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: format={manifest.get('format')} is not known; this version reads {FORMAT}")
    kinds = {"step": int, "consumed_samples": int, "vocab_size": int, "source": str, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise InputError(f"{path}: {key}={manifest.get(key)!r} should be of type {kind.__name__}")
    if manifest.get("dtype") not in DTYPES:
        raise InputError(f"{path}: dtype={manifest.get('dtype')!r} should be one of {', '.join(DTYPES)}")
    if not isinstance(manifest.get("recipe"), dict | None):
        raise InputError(f"{path}: recipe={manifest['recipe']!r} should be an object or null")
    if manifest.get("crc32") != _own_crc32(manifest):
        raise InputError(f"{path}: does not have the CRC-32 it was written with")
    return manifest


def write_latest(root: Path, iteration: int) -> None:
    """Point Megatron's tracker file at `iteration`."""
    write_text(root / LATEST, f"{iteration}\n")


def copy_hf_files(source: Path, target: Path) -> list[str]:
    """Copy config, generation config and tokenizer files (no weights) that exist; returns their names.

    `target` is made if it does not exist.  Links are followed: the Hugging Face cache is made of them.
    """
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for name in CONFIG_FILES + TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
    return copied


def is_hugging_face(directory: Path) -> bool:
    """Whether a directory to start from holds Hugging Face's files and not a Megatron checkpoint."""
    return (directory / "config.json").is_file()


def refuse_other_model(held: ModelShape, shape: ModelShape, source: str, other: str = "model.hf") -> None:
    """Raise InputError if what `source` holds are weights of another model than `shape`, that of `other`."""
    for name in "num_layers hidden_size ffn_size num_heads num_kv_heads head_dim vocab_size tied_embeddings".split():
        if getattr(held, name) != getattr(shape, name):
            raise InputError(
                f"{source} holds another model: {name}={getattr(held, name)}, {other} has {getattr(shape, name)}"
            )


def require_space(out: Path, count: int, flag: str = "--out") -> None:
    """Raise InputError if `count` bytes do not fit on the disk that `out` will be on."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < count:
        raise InputError(
            f"{flag} {out}: no space left on the disk: {format_bytes(count)} needed, {format_bytes(free)} free; "
            "free some or choose another place"
        )


def parse_dtype(text: str | None) -> str | None:
    """A --dtype option: None (keep), or one of bfloat16, float16, float32 (also bf16, fp16, fp32)."""
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    name = short.get(text, text)
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype {text}: not supported; use one of {', '.join(DTYPES)}")
    return name
