"""Which relative distances a training saw, the gap it left, and how smooth RoPE is across it (equation 3)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.html_page import (
    NORMAL,
    WIDE,
    Block,
    Figure,
    Group,
    Heading,
    Paragraph,
    Row,
    Section,
    Table,
    missing,
    note,
)
from endprompt_megatron.method.smoothness import Smoothness
from endprompt_megatron.report.run_files import Run, Runs
from endprompt_megatron.report.sections.cells import NONE

SAMPLES = 256  # of methods that draw positions
UNKNOWN_PROMPT = 12  # tokens, about what EP_1 has, where the run's tokenizer is not here


@dataclass(frozen=True)
class Distances:
    """`counts` float64 [L]: supervised pairs a sample by distance; `prompts`: lengths in tokens, [] without any."""

    counts: np.ndarray
    gaps: list[tuple[int, int]]
    prompts: list[int]
    context: int  # tokens of the context segment beside the shortest prompt
    guessed: bool = False  # the prompts' lengths are not those of the run's tokenizer
    drawn: bool = False  # positions are random: a range is what SAMPLES of them reached

    @property
    def gap(self) -> tuple[int, int] | None:
        """The widest gap, both ends included; none where more samples might well fill it."""
        widest = max(self.gaps, key=lambda gap: gap[1] - gap[0], default=None)
        return None if widest and self.drawn and widest[1] - widest[0] < len(self.counts) / 50 else widest

    @property
    def width(self) -> int | None:
        """Distances in the widest gap."""
        return self.gap[1] - self.gap[0] + 1 if self.gap else None


def distance_coverage(run: Run) -> Distances | None:
    """What the recipe supervises, sources with prompts of their own by their weights.  None where it does not say."""
    from endprompt_megatron.config.load import recipe_of
    from endprompt_megatron.data.samples.terminal_segments import coverage_of
    from endprompt_megatron.method.positions import MAPS

    method, physical, target = (run.value(f"context.{key}") for key in ("method", "physical", "target"))
    if method not in MAPS or not isinstance(physical, int) or not isinstance(target, int):
        return None
    try:
        recipe = recipe_of(run.recipe)
    except InputError:
        return None
    guessed = False
    try:
        found = coverage_of(recipe, samples=SAMPLES)
    except (InputError, ImportError):
        guessed = True
        try:
            found = coverage_of(recipe, samples=SAMPLES, prompt_len=UNKNOWN_PROMPT)
        except InputError:
            return None
    lengths = sorted({b for _, b in found.segments if b})
    context = max(a for a, _ in found.segments)
    drawn = MAPS[method].varies
    return Distances(found.counts, found.gaps, lengths, context, guessed and bool(lengths), drawn)


def smoothness(run: Run) -> tuple[Smoothness, Smoothness, float] | None:
    """Bounds before and after the recipe's scaling, and the attention factor of the scaled RoPE.

    None where neither the model's directory is here nor a published model has its name, or the recipe lacks something.
    """
    from endprompt_megatron.common.files import read_json
    from endprompt_megatron.config.load import recipe_of
    from endprompt_megatron.config.resolve import resolve
    from endprompt_megatron.method.rope_parameters import scaled, written
    from endprompt_megatron.model.published_shapes import published_config
    from endprompt_megatron.model.shape import shape_of

    name, target = run.value("model.hf"), run.value("context.target")
    if not isinstance(name, str) or not isinstance(target, int):
        return None
    try:
        path = Path(name) / "config.json"
        config = read_json(path, "a Hugging Face config") if path.is_file() else published_config(name)
        if config is None:
            return None
        recipe, shape = recipe_of(run.recipe), shape_of(config, name)
        resolve(recipe, shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each optional GPU package that is absent announces itself
            from endprompt_megatron.method.rope import frequencies, transformers_config

        exported = written(config, scaled(shape.rope, recipe.context.scaling, str(run.directory)))
        before, _ = frequencies(transformers_config(config))
        after, attention = frequencies(transformers_config(exported), target)
    except (InputError, TypeError, KeyError, ValueError):
        return None
    return Smoothness(before.double().numpy()), Smoothness(after.double().numpy()), attention


def distances(runs: Runs) -> Section:
    """Coverage and smoothness, one part a run."""
    from endprompt_megatron.report.figures import coverage, wavelengths

    recipes = [run for run in runs.all if run.recipe]
    if not recipes:
        return Section("distances", "Distances trained", [missing("No recipe says which distances were trained.")])
    several = len(recipes) > 1
    said: list[Block] = []
    drawn, bounds = [], []
    for run in recipes:
        found = distance_coverage(run)
        name = f"**{run.name}**: " if several else ""
        if found is None:
            said.append(Paragraph(f"{name}The recipe does not say which distances were trained."))
            continue
        said.append(Paragraph(f"{name}{_words(found)}"))
        drawn.append(
            Figure(
                lambda axes, found=found: coverage(axes, found.counts, found.gaps),
                "Relative distances in training" + (f", {run.name}" if several else ""),
                run.name if several else "",
                size=NORMAL if several else WIDE,
            )
        )
        smooth = smoothness(run)
        if smooth is not None:
            bounds.append((run, found, *smooth))
    waves = [
        Figure(
            lambda axes, before=before, after=after, found=found: wavelengths(
                axes, before.wavelengths, after.wavelengths, found.gap
            ),
            f"Wavelengths, {run.name}",
            run.name if len(bounds) > 1 else "",
        )
        for run, found, before, after, _ in bounds
    ]
    shown = drawn if len(drawn) == 1 else [Group(drawn)] if drawn else []
    return Section("distances", "Distances trained", [*said, *shown, *_smooth(bounds, waves)])


def _words(found: Distances) -> str:
    target = len(found.counts)
    unseen = sum(high - low + 1 for low, high in found.gaps)
    words = f"Of the {target:,} relative distances in the target window, "
    if found.drawn:
        words += f"{SAMPLES} drawn samples supervised {1 - unseen / target:.1%}"
    else:
        words += f"{unseen / target:.0%} were never supervised" if unseen else "none was left out"
    if found.gap:
        low, high = found.gap
        words += f", the largest gap being {low:,} to {high:,}; there the model rests on the smoothness of scaled RoPE"
    words += "."
    if found.prompts:
        words += f" Terminal prompt: {' or '.join(map(str, found.prompts))} tokens"
        words += " (a guess: the run's tokenizer is not here)." if found.guessed else "."
    return words


def _smooth(bounds: list[tuple[Run, Distances, Smoothness, Smoothness, float]], waves: list[Figure]) -> list[Block]:
    """Equation 3 for the recipes' frequencies, and what it does not say."""
    title = Heading("Smoothness: the paper's equation 3")
    if not bounds:
        words = "The model's config is not here and no published model has its name: its frequencies are not known."
        return [title, missing(words)]
    head, columns = [], []
    for number, (run, found, before, after, _) in enumerate(bounds):
        kind = run.value("context.rope.type", "linear")
        if number == 0 or not np.array_equal(before.frequencies, bounds[0][2].frequencies):
            head.append("before scaling" if number == 0 else f"before scaling, {run.name}")
            columns.append((before, found.context, found.width if len(bounds) == 1 else None))
        head.append(f"after ({kind})" if len(bounds) == 1 else f"{run.name} ({kind})")
        columns.append((after, found.context, found.width))
    rows = [
        Row("highest frequency, radians a token", [f"{s.slope:.4g}" for s, _, _ in columns]),
        Row("largest change of a score of size 1 in 1 token", [f"{s.change(1):.3g}" for s, _, _ in columns]),
        Row("largest change of its slope in 1 token", [f"{s.curvature:.3g}" for s, _, _ in columns]),
        Row("fewest tokens from its lowest to its highest value", [f"{s.swing:,.1f}" for s, _, _ in columns]),
    ]
    if any(width for _, _, width in columns):

        def across(name: str, value: Callable[[Smoothness, int], str]) -> Row:
            return Row(name, [value(s, width) if width else NONE for s, _, width in columns])

        rows += [
            across("width of the gap, tokens", lambda _, width: f"{width:,}"),
            across("largest difference of the score across it", lambda s, width: f"{s.change(width):.3g}"),
            across(
                "pairs of dimensions with waves longer than it",
                lambda s, width: _share(s, 1 - s.turning_within(width)),
            ),
            across(
                "of them with half waves longer, which turn at most once in it",
                lambda s, width: _share(s, s.turning_once(width)),
            ),
        ]
    turning = [_share(s, s.turning_within(context)) for s, context, _ in columns]
    rows.append(Row("pairs that turn fully within the context segment", turning))
    vacuous = any(width and s.change(width) == 2 for s, _, width in columns)
    words = [
        "A score of size 1: its greatest absolute value over all distances is 1, for whatever content. "
        "The highest frequency alone sets the bound."
    ]
    if vacuous:
        words.append(
            "**Over the whole gap it says nothing:** 2 is the most that any score of size 1 can differ "
            "by. It speaks of neighbouring distances, not of tens of thousands of tokens."
        )
    words.append(
        "What carries a model across are the slow pairs, which hardly turn there, and the fast ones, whose every phase "
        "was seen at short distances already. That the pairs between them do right follows from no bound; real long "
        "inputs have to show it."
    )
    scaled = [(run, factor) for run, _, _, _, factor in bounds if factor != 1]
    words += [
        f"{run.name}: scores are also multiplied by {factor**2:.3f}, the square of RoPE's attention factor."
        for run, factor in scaled
    ]
    return [title, Table(head, rows), *note(words), Group(waves)]


def _share(smooth: Smoothness, share: float) -> str:
    count = len(smooth.frequencies)
    return f"{round(share * count)} of {count}"
