"""The report's sections on held-out text, the passkey and the virtual distance."""

from endprompt_megatron.common.html_page import (
    Cell,
    Figure,
    Group,
    HeatMap,
    HeatMaps,
    Paragraph,
    Section,
    missing,
    note,
)
from endprompt_megatron.evaluate import plots
from endprompt_megatron.report.load import Runs
from endprompt_megatron.report.models import Measured, Model
from endprompt_megatron.report.sections.training_curves import keys_of

MAX_TWO_NUMBERS = 4  # lengths across a heat map up to which a cell has room for a second number


def names_of(models: list[Model]) -> dict[str, str]:
    """The models' names by the keys of their colours."""
    return {model.key: model.name for model in models}


def text_quality(measured: Measured) -> Section:
    """Perplexity by length and by position."""
    title, models = "Held-out text", measured.of("perplexity")
    if not models:
        return Section("text", title, [missing("Perplexity was not measured (`--suite perplexity`).")])
    from endprompt_megatron.report.figures import page_palette

    of_suite, palette = measured.as_results("perplexity"), page_palette(names_of(models))
    drawn = [
        Figure(lambda axes: plots.by_length(axes, of_suite, palette), "Perplexity by length"),
        Figure(lambda axes: plots.by_position(axes, of_suite, palette), "Perplexity by position"),
    ]
    words = (
        "Real inputs, read as a whole. A model that uses its context gets better to the right; one past its window "
        "collapses."
    )
    windows = len(models[-1].measured["perplexity"]["by_length"][0]["windows"])
    spread = (
        f"Bars are standard errors over {windows} inputs, bands 95% of them."
        if windows > 1
        else "One input: no standard error."
    )
    slid = [(model, model.measured["perplexity"].get("sliding")) for model in models]
    told = [
        f"{model.name}, seeing {found['window']:,} tokens at a time: {found['perplexity']:.1f}."
        for model, found in slid
        if found
    ]
    if told:
        told.insert(0, "Every token of the longest inputs, sliding window:")
    small_print = note([spread, *told, *measured.left_out("perplexity")])
    return Section("text", title, [Paragraph(words), Group(drawn), *small_print])


def passkey(measured: Measured) -> Section:
    """Heat maps of the passkey, one a model, on one scale."""
    title, models = "Passkey", measured.of("needle")
    if not models:
        return Section("needle", title, [missing("Passkey retrieval was not measured (`--suite needle`).")])
    first = models[-1].measured["needle"]
    filler = {"noise": "repeated noise sentences", "text": "held-out text"}[first["filler"]]
    samples = first["cells"][0]["samples"]
    words = (
        f"Five digits hidden in {filler} and asked for at the end of a real input; {samples} "
        f"{'prompts' if samples > 1 else 'prompt'} a cell. Large: share of greedy answers with the exact digits."
    )
    if any(len(_lengths(model)) <= MAX_TWO_NUMBERS for model in models):
        words += " Small: mean log probability of the key's tokens, which shows degrees."
    maps = HeatMaps([heat_map(model) for model in models], "found")
    return Section("needle", title, [Paragraph(words), maps, *note(measured.left_out("needle"))])


def _lengths(model: Model) -> list[int]:
    return sorted({cell["length"] for cell in model.measured["needle"]["cells"]})


def heat_map(model: Model) -> HeatMap:
    """Lengths across, depths down."""
    found, lengths = model.measured["needle"]["cells"], _lengths(model)
    at = {(cell["length"], cell["depth"]): cell for cell in found}

    def level(cell: dict | None) -> tuple[float, Cell] | None:
        if cell is None:
            return None
        right = round(cell["accuracy"] * cell["samples"])
        title = f"{right} of {cell['samples']}, log probability {cell['logprob']:.2f}"
        small = f"{cell['logprob']:.2f}" if len(lengths) <= MAX_TWO_NUMBERS else ""
        return cell["accuracy"], Cell(f"{cell['accuracy']:.0%}", small=small, title=title)

    rows = [
        (f"{depth:.0%}", [level(at.get((length, depth))) for length in lengths])
        for depth in sorted({cell["depth"] for cell in found})
    ]
    return HeatMap(model.name, "depth", [plots.short(length) for length in lengths], rows)


def virtual(runs: Runs, measured: Measured) -> Section:
    """The virtual-distance probe, after and during training."""
    from endprompt_megatron.report.figures import PAGE, page_palette, virtual_over_training

    title, drawn, models = "Virtual distance", [], measured.of("virtual")
    if models:
        of_suite, palette = measured.as_results("virtual"), page_palette(names_of(models))
        for kind in ("repeat", "continue"):
            drawn.append(
                Figure(
                    lambda axes, kind=kind: plots.virtual_distance(axes, of_suite, kind, palette=palette),
                    f"Virtual distance, {kind}",
                )
            )
    probed = [run for run in runs.all if any(line.get("virtual") for line in run.validations)]
    for run in probed:
        name = f", {run.name}" if len(runs.all) > 1 else ""
        drawn.append(
            Figure(
                lambda axes, run=run: virtual_over_training(axes, run.validations, PAGE),
                f"Virtual distance over training{name}",
                f"During training{name}: faint at the start, strong at the end.",
            )
        )
    if len(probed) > 1:
        drawn += _furthest_over_steps(runs)
    if not drawn:
        words = "The virtual-distance probe was not run, neither in training nor after it."
        return Section("virtual", title, [missing(words)])
    words = (
        "A short input whose last tokens carry far position ids: to the rotary embedding a long input, to the "
        "hardware a short one. Recalling means repeating a passage from before the jump word for word; going on means "
        "plain text across it. The leftmost point has no jump."
    )
    return Section("virtual", title, [Paragraph(words), Group(drawn), *note(measured.left_out("virtual"))])


def _furthest_over_steps(runs: Runs) -> list[Figure]:
    """The runs' losses over the steps at the furthest virtual distance that all of them probe; [] without any."""
    from endprompt_megatron.report.figures import over_steps, page_palette

    keyed = {key: run for key, run in keys_of(runs).items() if any(line.get("virtual") for line in run.validations)}
    probed = {key: [line for line in run.validations if line.get("virtual")] for key, run in keyed.items()}
    common = set.intersection(*(set(line["virtual"]) for lines in probed.values() for line in lines))
    if not common:
        return []
    furthest = max(common, key=int)
    lines = {}
    for key, of_run in probed.items():
        found = [(line["step"], line["virtual"][furthest]["loss"]) for line in of_run]
        found = [(step, loss) for step, loss in found if loss is not None]
        lines[key] = ([step for step, _ in found], [loss for _, loss in found])
    palette = page_palette({key: run.name for key, run in keyed.items()})
    title = f"Recalling at {int(furthest):,}, while training"
    return [Figure(lambda axes: over_steps(axes, lines, title, "loss, nats a token", palette, 0.0), title)]
