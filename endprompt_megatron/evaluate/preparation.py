"""What the measurements read, made and checked before any model is loaded."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from endprompt_megatron import __version__
from endprompt_megatron.checkpoint import layout
from endprompt_megatron.common.errors import InputError, Unavailable
from endprompt_megatron.common.files import read_json
from endprompt_megatron.evaluate.held_out_text import HeldOut, held_out, windows
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.model_fingerprint import fingerprint
from endprompt_megatron.evaluate.registry import KINDS, QuestionSuite
from endprompt_megatron.evaluate.requests import Answered, Item
from endprompt_megatron.evaluate.settings import EXTENDED, Settings
from endprompt_megatron.evaluate.suites import needle, perplexity, recall_suite, virtual
from endprompt_megatron.evaluate.suites.lm_eval_suite import ShortSuite
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.tokenizer import Tokenizer, load_tokenizer

_NATIVE = {"perplexity": perplexity, "needle": needle, "recall": recall_suite, "virtual": virtual}


@dataclass(frozen=True)
class Model:
    """Where a model is: its weights, and the Hugging Face config and tokenizer that belong to them."""

    weights: Path
    config: Path

    @property
    def window(self) -> int:
        """Tokens that it is made for.  Raises InputError for a config that cannot be read."""
        window = read_shape(self.config).window
        config = read_json(self.config / "config.json", "a Hugging Face config")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        # Dynamic scaling alone leaves the original window in the config, since its formula takes it from there.
        return int(window * rope["factor"]) if rope.get("rope_type") == "dynamic" else window


def model_at(path: Path, iteration: int | None = None) -> Model:
    """A Megatron checkpoint (RUN/checkpoints, or one iter_ of it).  Raises InputError if it is not whole."""
    found = layout.find_checkpoint(path, iteration)
    return Model(found, found / layout.HF_DIRECTORY)


@dataclass
class Inputs:
    """Every suite's items for every model, made when they are asked for."""

    settings: Settings
    models: dict[str, Model]
    tokenizer: Tokenizer
    text: HeldOut | None
    windows: np.ndarray | None
    probes: dict[str, list[dict]]
    questions: dict[tuple[str, str], QuestionSuite | ShortSuite]  # (label, suite)
    left_out: dict[str, str]  # suites and tasks that this machine has not got what they need for: what, and why
    fingerprints: dict[str, str] = field(default_factory=dict)

    def items(self, label: str) -> Iterator[Item]:
        """All that the model is asked, in a fixed order."""
        s = self.settings
        for suite in s.suites:
            if suite == "perplexity":
                yield from perplexity.items(self.windows, s.lengths, scored=s.scored)
                if s.stride is not None:
                    yield from perplexity.sliding_items(self.windows, self.models[label].window, s.stride)
            elif suite == "needle":
                filler = self.text.tokens if s.filler == "text" else None
                yield from needle.items(
                    self.tokenizer,
                    s.needle_lengths or s.lengths,
                    depths=s.depths,
                    samples=s.samples,
                    seed=s.seed,
                    filler=filler,
                )
            elif suite == "recall":
                yield from recall_suite.items(
                    self.tokenizer,
                    self.text.tokens,
                    s.lengths,
                    recall_suite.read_form(s.recall_form),
                    distances=s.recall_distances,
                    samples=s.samples,
                    seed=s.seed,
                )
            elif suite == "virtual":
                yield from virtual.items(self.probes)
            else:
                yield from self.questions[label, suite].items()

    def result(self, label: str, suite: str, pairs: list[Answered]) -> dict:
        """The suite's part of results.json."""
        return self._suite(label, suite).result(pairs)

    def series(self, label: str, suite: str, pairs: list[Answered]) -> list[Series]:
        """The values behind the suite's numbers."""
        return self._suite(label, suite).series(pairs)

    def _suite(self, label: str, suite: str):
        return _NATIVE.get(suite) or self.questions[label, suite]

    def job(self, label: str) -> str:
        """Tells apart what is asked: by settings, text, other files, and the model."""
        files = [(str(path), *_state(path)) for path in self.settings.files]
        what = [__version__, self.settings.as_dict(), files, self.text and self.text.sha256, self.fingerprints[label]]
        what += [sorted(self.left_out)]  # so that they are asked once they can be
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def expected(self, label: str) -> tuple[int, int] | None:
        """About how many items and tokens; None where a suite does not tell."""
        s, items, tokens = self.settings, 0, 0
        if "perplexity" in s.suites:
            items, tokens = len(s.lengths) * s.windows, sum(s.lengths) * s.windows
            if s.stride is not None:
                for item in perplexity.sliding_items(self.windows, self.models[label].window, s.stride):
                    items, tokens = items + 1, tokens + item.tokens
        if "needle" in s.suites:
            lengths = s.needle_lengths or s.lengths
            cells = len(s.depths) * s.samples
            items, tokens = items + len(lengths) * cells, tokens + sum(lengths) * cells
        if "recall" in s.suites:
            more = recall_suite.expected(s.lengths, s.recall_distances, s.samples)
            items, tokens = items + more[0], tokens + more[1]
        for probes in self.probes.values():
            items, tokens = items + len(probes), tokens + sum(probe["tokens"].size for probe in probes)
        for (of, suite), questions in self.questions.items():
            if of != label:
                continue
            if questions.count is None:
                return None
            mean = 0
            if suite in KINDS:
                mean = sum(s.lengths) / len(s.lengths) if KINDS[suite].by_length else questions.settings.max_length
            items, tokens = items + questions.count, tokens + round(questions.count * mean)
        return items, tokens


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
    shape = read_shape(extended.config)
    tokenizer = load_tokenizer(extended.config)
    for label, model in models.items():
        if label != EXTENDED:
            _same_tokenizer(tokenizer, extended.config, model.config)
    text = None
    if settings.text is not None:
        text = held_out(settings.text, tokenizer)
    elif {"perplexity", "recall", "virtual"} & set(settings.suites) or settings.filler == "text":
        raise InputError(
            "--text: missing; perplexity, recall, virtual and --filler text measure on held-out text: give a UTF-8 "
            "text file that the training has not seen, a book for example, or the PREFIX of a prepared dataset"
        )
    rows, probes = None, {}
    if "perplexity" in settings.suites:
        if settings.lengths[0] <= settings.scored:
            raise InputError(
                f"--lengths {settings.lengths[0]}: should be above the {settings.scored} scored tokens; "
                "use longer inputs or a smaller --scored"
            )
        rows = windows(text.tokens, settings.lengths[-1], settings.windows)
        if settings.stride is not None:
            _check_stride(settings, models)
    if "needle" in settings.suites:
        filler = text.tokens if settings.filler == "text" else None
        for length in settings.needle_lengths or settings.lengths:
            rng = np.random.default_rng(0)
            needle.build_prompt(tokenizer, "12345", length - needle.ANSWER_TOKENS, 0.5, filler, rng)
    if "recall" in settings.suites:
        form, rng = recall_suite.read_form(settings.recall_form), np.random.default_rng(0)
        for length in settings.lengths:
            for distance in recall_suite.distances_of(length, settings.recall_distances):
                recall_suite.build_row(tokenizer, text.tokens, length, distance, form, rng)
    if "virtual" in settings.suites:
        probes = _probes(settings, text, shape.window)
    if not settings.beyond_window:
        _refuse_beyond(settings, models)
    questions, left_out = {}, {}
    for suite in settings.suites:
        if suite in _NATIVE:
            continue
        try:
            of_suite = {(label, suite): _suite(suite, settings, model, tokenizer) for label, model in models.items()}
        except Unavailable as error:
            if len(left_out) == len(settings.suites) - 1:
                raise
            left_out[suite] = str(error)
            continue
        questions |= of_suite
        if suite == "short":
            left_out |= questions[EXTENDED, "short"].left_out
    settings = replace(settings, suites=[suite for suite in settings.suites if suite not in left_out])
    inputs = Inputs(settings, models, tokenizer, text, rows, probes, questions, left_out)
    inputs.fingerprints = {label: fingerprint(model.weights) for label, model in models.items()}
    return inputs


def _suite(suite: str, settings: Settings, model: Model, tokenizer: Tokenizer) -> QuestionSuite | ShortSuite:
    if suite == "short":
        return ShortSuite(settings, model.config)
    return QuestionSuite(suite, settings, model.config, model.window, tokenizer)


def _refuse_beyond(settings: Settings, models: dict[str, Model]) -> None:
    """Raise InputError for an input that is longer than a model's window."""
    longest = {}
    if {"perplexity", "recall", "ruler"} & set(settings.suites):
        longest["--lengths"] = settings.lengths[-1]
    if "needle" in settings.suites:
        flag = "--needle-lengths" if settings.needle_lengths else "--lengths"
        longest[flag] = (settings.needle_lengths or settings.lengths)[-1]
    for model in models.values():
        for flag, length in longest.items():
            if length > model.window:
                raise InputError(
                    f"{flag} {length}: above the window of {model.window} of {model.config}; "
                    "use shorter ones, or --beyond-window to measure it there nevertheless"
                )


def _check_stride(settings: Settings, models: dict[str, Model]) -> None:
    for model in models.values():
        if settings.stride > min(model.window, settings.lengths[-1]) - 1:
            raise InputError(
                f"--stride {settings.stride}: should be below the window of {model.window} and --lengths "
                f"{settings.lengths[-1]}; a half or a quarter of the window is usual"
            )


def _probes(settings: Settings, text: HeldOut, window: int) -> dict[str, list[dict]]:
    if settings.physical < 16:
        raise InputError(f"--physical {settings.physical}: a probe needs 16 tokens or more")
    if len(text.tokens) < settings.physical:
        raise InputError(
            f"--physical {settings.physical}: the held-out text has {len(text.tokens)} tokens only; give a longer one"
        )
    if settings.distances is None and window < settings.physical:
        raise InputError(f"--physical {settings.physical}: above the model's window of {window}; use a smaller one")
    distances = settings.distances or virtual.default_distances(settings.physical, window)
    if distances[0] < settings.physical:
        raise InputError(f"--distances {distances[0]}: below the probe's {settings.physical} tokens; see --physical")
    return {
        kind: virtual.probe_inputs(
            text.tokens,
            physical_len=settings.physical,
            distances=distances,
            samples=settings.probe_samples,
            seed=settings.seed,
            kind=kind,
        )
        for kind in virtual.KINDS
    }


def _same_tokenizer(tokenizer: Tokenizer, extended: Path, baseline: Path) -> None:
    sample = needle.TASK + needle.NOISE + needle.NEEDLE.format(key="12345") + "\n\nÀ l'heure, 3.14 (x_1)"
    read_shape(baseline)
    if load_tokenizer(baseline).encode(sample) != tokenizer.encode(sample):
        raise InputError(f"--baseline {baseline}: its tokenizer is not that of {extended}; losses cannot be compared")
