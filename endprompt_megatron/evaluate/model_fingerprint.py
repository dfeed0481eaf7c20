"""What tells one model from another without reading all of its weights.  No torch.

Of every tensor in safetensors the first, the middle and the last 4 KiB are read: training changes them all, a copy
none.  A Megatron checkpoint has the checksums of its files in its manifest.
"""

import hashlib
import itertools
import json
from pathlib import Path

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert.safetensors_header import read_header

_BLOCK = 4096


def fingerprint(directory: Path) -> str:
    """SHA-256 over config and weights of a Hugging Face directory or an iter_ directory of Megatron's, 16 digits.

    Raises InputError for weights that cannot be read.
    """
    digest = hashlib.sha256()
    names = ("config.json", "generation_config.json") if layout.is_hugging_face(directory) else (layout.MANIFEST,)
    for name in names:
        if (directory / name).is_file():
            digest.update((directory / name).read_bytes())
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".distcp") or not path.is_file():
            continue
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        try:
            with open(path, "rb") as file:
                for begin, end in _tensors(path):
                    for at in (begin, (begin + end) // 2, max(begin, end - _BLOCK)):
                        file.seek(at)
                        digest.update(file.read(min(_BLOCK, end - at)))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the weights cannot be read ({error}); get the file again") from None
    return digest.hexdigest()[:16]


def _tensors(path: Path) -> list[tuple[int, int]]:
    """Where the bytes of every tensor lie; of another kind of file, 64 equal parts of it."""
    if path.suffix == ".safetensors":
        return sorted((entry.begin, entry.end) for entry in read_header(path).values())
    size = path.stat().st_size
    edges = [size * part // 64 for part in range(65)]
    return list(itertools.pairwise(edges))
