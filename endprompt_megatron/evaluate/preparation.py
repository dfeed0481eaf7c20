"""What the measurements read, made and checked before any model is loaded."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron import __version__
from endprompt_megatron.checkpoint import layout
from endprompt_megatron.common.errors import InputError, Unavailable
from endprompt_megatron.evaluate.held_out_text import HeldOut, held_out
from endprompt_megatron.evaluate.model_fingerprint import fingerprint
from endprompt_megatron.evaluate.registry import EXTENDED, SUITES, Prepared, Settings, Subject, all_options
from endprompt_megatron.evaluate.requests import Request
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Model:
    """Where a model is: its weights, and the Hugging Face config and tokenizer that belong to them."""

    weights: Path
    config: Path

    @property
    def window(self) -> int:
        """Tokens that it is made for.  Raises InputError for a config that cannot be read."""
        return read_shape(self.config).window


def model_at(path: Path, iteration: int | None = None) -> Model:
    """A Megatron checkpoint (RUN/checkpoints, or one iter_ of it).  Raises InputError if it is not whole."""
    found = layout.find_checkpoint(path, iteration)
    return Model(found, found / layout.HF_DIRECTORY)


@dataclass
class Inputs:
    """Every suite ready for every model; what they ask is made when it is asked for."""

    settings: Settings
    models: dict[str, Model]
    text: HeldOut | None
    prepared: dict[tuple[str, str], Prepared]  # by (label, suite)
    left_out: dict[str, str]  # suites and tasks that this machine has not got what they need for: what, and why
    fingerprints: dict[str, str]

    def requests(self, label: str) -> Iterator[Request]:
        """All that the model is asked, in a fixed order."""
        for suite in self.settings.suites:
            yield from self.prepared[label, suite].requests()

    def job(self, label: str) -> str:
        """Tells apart what is asked: by settings, text, other files, and the model."""
        files = [(str(path), *_state(path)) for path in self.settings.files]
        what = [__version__, self.settings.as_dict(), files, self.text and self.text.sha256, self.fingerprints[label]]
        what += [sorted(self.left_out)]  # so that they are asked once they can be
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def expected(self, label: str) -> tuple[int, int] | None:
        """About how many requests and tokens; None where a suite does not tell."""
        every = [self.prepared[label, suite].expected for suite in self.settings.suites]
        if None in every:
            return None
        return sum(requests for requests, _ in every), sum(tokens for _, tokens in every)


def _state(path: Path) -> tuple[int, int]:
    """Size and time of change, of a directory's newest file."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    states = [each.stat() for each in files if each.exists()]
    return sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)


def prepare(settings: Settings, models: dict[str, Model]) -> Inputs:
    """Read the text and build what can be built, so that what is wrong shows before a model is loaded.

    Raises InputError.
    """
    settings.check()
    extended = models[EXTENDED]
    window = read_shape(extended.config).window
    tokenizer = load_tokenizer(extended.config)
    for label, model in models.items():
        if label != EXTENDED:
            _same_tokenizer(tokenizer, extended.config, model.config)
    text = None if settings.text is None else held_out(settings.text, tokenizer)
    readers = [name for name in settings.suites if SUITES[name].reads_text(settings)]
    if readers and text is None:
        raise InputError(
            f"--text: missing; {', '.join(readers)} {'read' if len(readers) > 1 else 'reads'} held-out text: give a "
            "UTF-8 text file that the training has not seen, a book for example, or the PREFIX of a prepared dataset"
        )
    if not settings.beyond_window:
        _refuse_beyond(settings, models)
    prepared: dict[tuple[str, str], Prepared] = {}
    left_out: dict[str, str] = {}
    for name in settings.suites:
        try:
            _refuse_without_data(settings, name)
            for label in models:
                subject = Subject(settings, models, label, tokenizer, text, window)
                prepared[label, name] = SUITES[name].prepare(subject)
            left_out |= prepared[EXTENDED, name].left_out
        except Unavailable as error:
            if len(settings.suites) - len(left_out.keys() & set(settings.suites)) == 1:
                raise
            left_out[name] = str(error)
    settings = settings.with_suites([name for name in settings.suites if name not in left_out])
    fingerprints = {label: fingerprint(model.weights) for label, model in models.items()}
    return Inputs(settings, models, text, prepared, left_out, fingerprints)


def _refuse_without_data(settings: Settings, suite: str) -> None:
    """Raise Unavailable for an option that the suite cannot do without."""
    options = all_options()
    for name, reason in SUITES[suite].requires.items():
        if getattr(settings, name) is None:
            raise Unavailable(f"{options[name].flag}: missing; {reason}")


def _refuse_beyond(settings: Settings, models: dict[str, Model]) -> None:
    """Raise InputError for an input that is longer than a model's window."""
    longest: dict[str, int] = {}
    for suite in settings.suites:
        for flag, lengths in SUITES[suite].real_lengths(settings).items():
            longest[flag] = max(longest.get(flag, 0), *lengths)
    for model in models.values():
        for flag, length in longest.items():
            if length > model.window:
                raise InputError(
                    f"{flag} {length}: above the window of {model.window} of {model.config}; "
                    "use shorter ones, or --beyond-window to measure it there nevertheless"
                )


def _same_tokenizer(tokenizer: Tokenizer, extended: Path, baseline: Path) -> None:
    sample = "The pass key is 12345. Remember it.\nWhat is it?\n\nÀ l'heure, 3.14 (x_1)  The grass is green."
    read_shape(baseline)
    if load_tokenizer(baseline).encode(sample) != tokenizer.encode(sample):
        raise InputError(f"--baseline {baseline}: its tokenizer is not that of {extended}; losses cannot be compared")
