"""Runs the measurements on the extended model, and on a baseline beside it, and writes what they gave.

results.json holds everything that is needed to repeat them: models, text, lengths, seeds, versions, times.
"""

import gc
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from endprompt_megatron import __version__
from endprompt_megatron.errors import InputError
from endprompt_megatron.evaluate import needle, perplexity, virtual
from endprompt_megatron.evaluate.engine import Engine, TransformersEngine
from endprompt_megatron.evaluate.text import HeldOut, held_out, windows
from endprompt_megatron.files import staged_directory, write_json
from endprompt_megatron.shape import read_shape
from endprompt_megatron.tokenizer import Tokenizer, load_tokenizer

SUITES = ("perplexity", "needle", "virtual")
LATER_SUITES = ("ruler", "longbench")
EXTENDED, BASELINE = "extended", "baseline"


@dataclass
class Settings:
    """What to measure.  Lengths in tokens."""

    suites: list[str]
    lengths: list[int]
    text: str | None = None
    windows: int = 2
    scored: int = 512
    depths: list[float] = field(default_factory=lambda: list(needle.DEPTHS))
    samples: int = 1
    filler: str = "noise"
    needle_lengths: list[int] | None = None  # None: `lengths`
    physical: int = 512
    distances: list[int] | None = None  # None: virtual.default_distances up to the extended model's window
    probe_samples: int = 8
    seed: int = 0
    dtype: str = "bfloat16"


@dataclass
class Inputs:
    """What the measurements read, made and checked before any model is loaded."""

    settings: Settings
    tokenizer: Tokenizer
    text: HeldOut | None
    windows: np.ndarray | None
    probes: dict[str, list[dict]]


def parse_suites(value: str) -> list[str]:
    """Names of suites from a comma-separated list.  Raises InputError for what this version does not have."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name in LATER_SUITES:
            raise InputError(f"--suite {name}: comes in a later version; this one has {', '.join(SUITES)}")
        if name not in SUITES:
            raise InputError(f"--suite {name}: unknown; this version has {', '.join(SUITES)}")
    if not names:
        raise InputError(f"--suite {value!r}: names no suite; use some of {', '.join(SUITES)}")
    return [name for name in SUITES if name in names]


def parse_numbers(flag: str, value: str, kind: type = int) -> list:
    """Ascending positive numbers from a comma-separated list.  Raises InputError naming `flag`."""
    example = "4096,8192" if kind is int else "0.1,0.5,0.9"
    try:
        numbers = [kind(item) for item in value.split(",")]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise InputError(f"{flag} {value}: should be {what} with commas between them, such as {example}") from None
    if numbers != sorted(set(numbers)):
        raise InputError(
            f"{flag} {value}: should ascend without repeats; use {','.join(map(str, sorted(set(numbers))))}"
        )
    if numbers[0] < (1 if kind is int else 0) or (kind is float and numbers[-1] > 1):
        wanted = "positive" if kind is int else "between 0 and 1"
        raise InputError(f"{flag} {value}: should be {wanted}, such as {example}")
    return numbers


def prepare(settings: Settings, extended: Path, baseline: Path | None) -> Inputs:
    """Read the text and build every input, so that what is wrong shows before a model is loaded.

    Raises InputError.
    """
    shape = read_shape(extended)
    tokenizer = load_tokenizer(extended)
    text = None
    if settings.text is not None:
        text = held_out(settings.text, tokenizer)
    elif {"perplexity", "virtual"} & set(settings.suites) or settings.filler == "text":
        raise InputError(
            "--text: missing; perplexity, virtual and --filler text measure on held-out text: give a UTF-8 text file "
            "that the training has not seen, a book for example, or the PREFIX of a prepared dataset"
        )
    if baseline is not None:
        _same_tokenizer(tokenizer, extended, baseline)
    rows, probes = None, {}
    if "perplexity" in settings.suites:
        if settings.lengths[0] <= settings.scored:
            raise InputError(
                f"--lengths {settings.lengths[0]}: should be above the {settings.scored} scored tokens; "
                "use longer inputs or a smaller --scored"
            )
        rows = windows(text.tokens, settings.lengths[-1], settings.windows)
    if "needle" in settings.suites:
        filler = text.tokens if settings.filler == "text" else None
        for length in settings.needle_lengths or settings.lengths:
            rng = np.random.default_rng(0)
            needle.build_prompt(tokenizer, "12345", length - needle.ANSWER_TOKENS, 0.5, filler, rng)
    if "virtual" in settings.suites:
        probes = _probes(settings, text, shape.window)
    return Inputs(settings, tokenizer, text, rows, probes)


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


def measure(engine: Engine, inputs: Inputs, tick: Callable[[str], None]) -> dict:
    """All suites on one model: {suite: results}, and "seconds" by suite."""
    settings, result, seconds = inputs.settings, {}, {}
    for suite in settings.suites:
        started = time.monotonic()
        if suite == "perplexity":
            result[suite] = perplexity.perplexity(
                engine, inputs.windows, settings.lengths, scored=settings.scored, tick=tick
            )
        elif suite == "needle":
            result[suite] = needle.needle(
                engine,
                inputs.tokenizer,
                settings.needle_lengths or settings.lengths,
                depths=settings.depths,
                samples=settings.samples,
                seed=settings.seed,
                filler=inputs.text.tokens if settings.filler == "text" else None,
                tick=tick,
            )
        else:
            result[suite] = {"physical": settings.physical, "samples": settings.probe_samples}
            result[suite] |= {kind: _probe(engine, probes, tick) for kind, probes in inputs.probes.items()}
        seconds[suite] = round(time.monotonic() - started, 2)
    return {**result, "seconds": seconds}


def _probe(engine: Engine, probes: list[dict], tick: Callable[[str], None]) -> dict:
    """{distance: {loss, accuracy}} of one kind of virtual-distance probe."""
    result = {}
    for probe in probes:
        tick(f"virtual {probe['distance']}")
        scored = probe["scored"]
        first = int(scored.any(axis=0).argmax())
        last = scored.shape[1] - first
        losses, correct = engine.token_losses(probe["tokens"], probe["position_ids"], last=last)
        result[str(probe["distance"])] = virtual.summarise(losses, correct, scored[:, first:])
    return result


def work(inputs: Inputs) -> int:
    """Ticks that `measure` will give for one model."""
    settings, total = inputs.settings, 0
    if "perplexity" in settings.suites:
        total += perplexity.work(settings.lengths, settings.windows)
    if "needle" in settings.suites:
        total += needle.work(settings.needle_lengths or settings.lengths, settings.depths, settings.samples)
    return total + sum(len(probes) for probes in inputs.probes.values())


def evaluate(
    settings: Settings,
    extended: Path,
    out: Path,
    *,
    baseline: Path | None = None,
    device: str = "cpu",
    progress: Callable[[int], Callable[[str], None]] = lambda _: lambda _: None,
) -> dict:
    """Measure, write `out`/results.json and the plots, and return the results.

    `progress(total)` gives a function that is called with a description before each input is read.  `out` appears
    when it is whole.  Raises InputError.
    """
    from endprompt_megatron.evaluate.plots import write_plots

    with staged_directory(out) as staging:
        inputs = prepare(settings, extended, baseline)
        models = {EXTENDED: extended} if baseline is None else {BASELINE: baseline, EXTENDED: extended}
        tick = progress(work(inputs) * len(models))
        started = time.monotonic()
        results = {
            "format": 1,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": asdict(settings),
            "text": inputs.text.describe() if inputs.text else None,
            "models": {},
            "measurements": {},
        }
        for label, directory in models.items():
            tick(f"loading {label}")
            engine = TransformersEngine(directory, device, dtype=settings.dtype)
            results["models"][label] = engine.describe()
            results["measurements"][label] = measure(engine, inputs, lambda what, label=label: tick(f"{label}: {what}"))
            # Two models of 8B side by side would not fit: the first goes before the second comes.
            del engine
            gc.collect()
        results["seconds"] = round(time.monotonic() - started, 2)
        results["versions"] = _versions()
        write_json(staging / "results.json", results)
        write_plots(results, staging)
    return results


def _versions() -> dict:
    import torch
    import transformers

    return {
        "endprompt_megatron": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
