"""What questions are made of: essays and how they part into sentences, SQuAD, HotpotQA, a long list of words.

Files are given by path, in the form that NVIDIA's scripts read.  Essays, sentences and words have a default out of
pinned Python packages, which every question and summary names.
"""

import functools
import hashlib
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError, Unavailable
from endprompt_megatron.common.file_lock import lock_file
from endprompt_megatron.common.files import disk_errors
from endprompt_megatron.common.packages import ESSAYS_PACKAGE, Package, download, read_essays
from endprompt_megatron.evaluate.suites.ruler.ruler_settings import RulerSettings

PUNKT_PACKAGE = Package(
    name="llama-index-core",
    version="0.14.25",
    filename="llama_index_core-0.14.25-py3-none-any.whl",
    sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    megabytes=11.9,
)
PUNKT = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/"
PUNKT_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
WORDS_PACKAGE = Package(
    name="english-words",
    version="2.0.2",
    filename="english_words-2.0.2-py3-none-any.whl",
    sha256="a65b900b17201526d8ab2d414f45e5a37afc714a1857377b30182c754ae6e0d6",
    megabytes=8.2,
)
WORDS = "english_words/data/web2_alpha_lower.pickle"
WORDS_SHA256 = "affcd6d45fdf3cc843d585c99c97ad615094e760e6c4756b654bab6c73bc2eca"  # NVIDIA's english_words.json
NVIDIAS = "NVIDIA's english_words.json"


@dataclass(frozen=True)
class Asked:
    """A question of a data set.  `own`: places of its documents; `near`: of others from the same article."""

    question: str
    answers: list[str]
    own: list[int]
    near: list[int]


class Sources:
    """The sources of one run, read when they are first wanted.  Every method raises InputError for a bad file."""

    def __init__(self, settings: RulerSettings) -> None:
        self._settings = settings
        self._sentences: dict[int, list[str]] = {}

    def _wheel(self, package: Package) -> zipfile.ZipFile:
        """The package's wheel, downloaded by one process of those that want it at once."""
        directory = self._settings.cache
        there = (directory / package.filename).is_file()
        with disk_errors(directory, "RULER's sources"):
            directory.mkdir(parents=True, exist_ok=True)
            with open(directory / ".lock", "w") as lock:
                lock_file(lock, wait=True)
                try:
                    path = download(package, directory, say=lambda line: there or print(line, file=sys.stderr))
                except InputError as error:
                    raise Unavailable(f"--suite ruler: {error}") from None
        return zipfile.ZipFile(path)

    @property
    def haystack_name(self) -> str:
        """What the essays are, for every result."""
        if self._settings.haystack is not None:
            return named(self._settings.haystack)
        return f"49 essays of {ESSAYS_PACKAGE.requirement}, the default"

    @functools.cached_property
    def essay_words(self) -> list[str]:
        """The essays, blank by blank."""
        if self._settings.haystack is not None:
            content = _read("--haystack", self._settings.haystack, "PaulGrahamEssays.json, an object with a text")
            text = _field("--haystack", self._settings.haystack, lambda: content["text"], str, "an object with a text")
        else:
            with self._wheel(ESSAYS_PACKAGE) as wheel:
                text = "".join(essay.decode("utf-8") for essay in read_essays(wheel))
        return re.sub(r"\s+", " ", text).split(" ")

    def sentences(self, count: int) -> list[str]:
        """The first `count` words of the essays, over again where they end, as sentences.

        The result is kept: most samples of a task ask for the same.
        """
        if count not in self._sentences:
            words = self.essay_words
            text = " ".join((words * -(-count // len(words)))[: max(count, 0)])
            while len(self._sentences) >= 4:
                del self._sentences[next(iter(self._sentences))]
            self._sentences[count] = self.split(text.strip())
        return self._sentences[count]

    @functools.cached_property
    def punkt(self) -> dict[str, str]:
        """The files of the Punkt model by name."""
        directory = self._settings.punkt
        if directory is None:
            with self._wheel(PUNKT_PACKAGE) as wheel:
                return {name: wheel.read(PUNKT + name).decode("utf-8") for name in PUNKT_FILES}
        try:
            return {name: (Path(directory) / name).read_text(encoding="utf-8") for name in PUNKT_FILES}
        except (OSError, ValueError) as error:
            raise InputError(f"--punkt {directory}: cannot be read as NLTK's punkt_tab/english ({error})") from None

    @functools.cached_property
    def split(self) -> Callable[[str], list[str]]:
        """NLTK's sentence splitter with its English parameters, as nltk.sent_tokenize uses it."""
        try:
            from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
        except ModuleNotFoundError as error:
            raise InputError(
                f"--suite ruler: needs the package {error.name}; pip install -r requirements.txt"
            ) from None
        tables = (self.punkt[name].removesuffix("\n").split("\n") for name in PUNKT_FILES)
        abbreviations, collocations, contexts, starters = ([line.split("\t") for line in table] for table in tables)
        parameters = PunktParameters()
        try:
            parameters.abbrev_types = {word for [word] in abbreviations}
            parameters.collocations = {(first, second) for first, second in collocations}
            parameters.ortho_context.update({word: int(flags) for word, flags in contexts})
            parameters.sent_starters = {word for [word] in starters}
        except ValueError as error:
            raise InputError(f"--punkt {self._settings.punkt}: is not NLTK's punkt_tab/english ({error})") from None
        return PunktSentenceTokenizer(parameters).tokenize

    @functools.cached_property
    def words_name(self) -> str:
        """What the long list of words is."""
        if self._settings.english_words is None:
            return f"web2 of {WORDS_PACKAGE.requirement}, the default"
        digest = hashlib.sha256(Path(self._settings.english_words).read_bytes()).hexdigest()
        return NVIDIAS if digest == WORDS_SHA256 else named(self._settings.english_words)

    @functools.cached_property
    def english_words(self) -> list[str]:
        """The list that cwe draws from when it wants more words than wonderwords has."""
        file = self._settings.english_words
        if file is None:
            with self._wheel(WORDS_PACKAGE) as wheel:
                return sorted(pickle.loads(wheel.read(WORDS)))  # a set; the wheel is the pinned one
        content = _read("--english-words", file, "english_words.json, an object of words")
        return _field("--english-words", file, lambda: list(map(str, content.values())), list, "an object of words")

    @functools.cache  # noqa: B019  (there is one for a run)
    def questions(self, dataset: str) -> tuple[list[Asked], list[str]]:
        """The answerable questions of `squad` or `hotpotqa` in their order, and all documents, sorted, each once."""
        flag, file = f"--{dataset}", getattr(self._settings, dataset)
        what, read = {"squad": ("SQuAD's dev-v2.0.json", _squad), "hotpotqa": ("HotpotQA's dev set", _hotpotqa)}[
            dataset
        ]
        content = _read(flag, file, what)
        asked, documents = _field(flag, file, lambda: read(content), tuple, what)
        if not asked:
            raise InputError(f"{flag} {file}: holds no question with an answer; expected {what}")
        return asked, documents


def fetch_defaults(say: Callable[[str], None]) -> None:
    """Download the default essays and sentence splitter, so that RULER can be asked later without a network."""
    sources = Sources(RulerSettings(lengths=(1,)))
    try:
        _ = sources.essay_words, sources.punkt
        say(f"RULER's essays: {sources.haystack_name}, in {RulerSettings(lengths=(1,)).cache}")
    except InputError as error:
        say(f"RULER's essays: not there, and needed only for tools/evaluate.py --suite ruler ({error})")


@functools.lru_cache(maxsize=1)
def sources_of(settings: RulerSettings) -> Sources:
    """The sources for these settings; those of the last are kept, so that a check and the run read files once."""
    return Sources(settings)


def _squad(content: Any) -> tuple[list[Asked], list[str]]:
    articles = [article["paragraphs"] for article in content["data"]]
    documents = sorted({paragraph["context"] for paragraphs in articles for paragraph in paragraphs})
    place = {text: number for number, text in enumerate(documents)}
    asked = []
    for paragraphs in articles:
        there = [place[paragraph["context"]] for paragraph in paragraphs]
        for paragraph, own in zip(paragraphs, there, strict=True):
            near = [other for other in there if other != own]
            for qa in paragraph["qas"]:
                if not qa["is_impossible"]:
                    asked.append(_asked(qa["question"], [answer["text"] for answer in qa["answers"]], [own], near))
    return asked, documents


def _hotpotqa(content: Any) -> tuple[list[Asked], list[str]]:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in record["context"]] for record in content]
    documents = sorted({text for of_record in texts for text in of_record})
    place = {text: number for number, text in enumerate(documents)}
    return [
        _asked(record["question"], [record["answer"]], [place[text] for text in of_record], [])
        for record, of_record in zip(content, texts, strict=True)
    ], documents


def _asked(question: Any, answers: list, own: list[int], near: list[int]) -> Asked:
    if not isinstance(question, str) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"question {question!r} has no text or no answer")
    return Asked(question, answers, own, near)


def _read(flag: str, path: Path | str, what: str) -> Any:
    """JSON of any kind."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half characters, which no tokenizer takes
        return value
    except FileNotFoundError:
        raise InputError(f"{flag} {path}: no such file; expected {what}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: cannot be read as {what} ({error})") from None


def _field(flag: str, path: Path | str, read: Callable[[], Any], kind: type, what: str) -> Any:
    """What `read` finds in a file; InputError if it stumbles, or finds nothing or another type."""
    try:
        value = read()
        if isinstance(value, kind) and value:
            return value
        reason = f"found {type(value).__name__}" if value else "it is empty"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InputError(f"{flag} {path}: is not {what} ({' '.join(reason.split())[:200]})")


def named(path: Path | str) -> str:
    """A file's name and the beginning of its SHA-256: machines have it in different places."""
    return f"{Path(path).name} (SHA-256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]})"
