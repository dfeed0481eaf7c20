"""The report's sections on held-out text, the passkey, recall and the virtual distance."""

from html import escape

from endprompt_megatron.evaluate import plots
from endprompt_megatron.report.html import Figures, details, group, missing, note, section, table
from endprompt_megatron.report.load import Runs
from endprompt_megatron.report.models import Measured, Model
from endprompt_megatron.report.sections import cells
from endprompt_megatron.report.sections.training_curves import keys_of

WIDEST = 4  # lengths across a heat map, up to which a cell has room for a second number


def names_of(models: list[Model]) -> dict[str, str]:
    """The models' names by the keys of their colours."""
    return {model.key: model.name for model in models}


def text_quality(measured: Measured, figures: Figures) -> str:
    """Perplexity by length and by position."""
    title, models = "Held-out text", measured.of("perplexity")
    if not models:
        return section("text", title, missing("Perplexity was not measured (<code>--suite perplexity</code>)."))
    from endprompt_megatron.report.figures import page_palette

    of_suite, palette = measured.as_results("perplexity"), page_palette(names_of(models))
    drawn = [
        figures.figure(lambda axes: plots.by_length(axes, of_suite, palette), "Perplexity by length"),
        figures.figure(lambda axes: plots.by_position(axes, of_suite, palette), "Perplexity by position"),
    ]
    words = (
        "<p>Real inputs, read whole. A model that uses its context gets better to the right; one past its window "
        "collapses.</p>"
    )
    windows = len(models[-1].measured["perplexity"]["by_length"][0]["windows"])
    spread = (
        f"Bars are standard errors over {windows} inputs, bands 95% of them."
        if windows > 1
        else "One input: no standard error."
    )
    slid = [(model, model.measured["perplexity"].get("sliding")) for model in models]
    told = [
        f"{escape(model.name)}, seeing {found['window']:,} tokens at a time: {found['perplexity']:.1f}."
        for model, found in slid
        if found
    ]
    if told:
        told.insert(0, "Every token of the longest inputs, sliding window:")
    return section(
        "text", title, words, group(drawn), note([spread, *told, *map(escape, measured.left_out("perplexity"))])
    )


def passkey(measured: Measured) -> str:
    """Heat maps of the passkey, one a model, on one scale."""
    title, models = "Passkey", measured.of("needle")
    if not models:
        return section("needle", title, missing("Passkey retrieval was not measured (<code>--suite needle</code>)."))
    maps = [f"<figure><h3>{cells.head(model)}</h3>{heat(model)}</figure>" for model in models]
    first = models[-1].measured["needle"]
    filler = {"noise": "repeated noise sentences", "text": "held-out text"}[first["filler"]]
    samples = first["cells"][0]["samples"]
    small = (
        " Small: mean log probability of the key's tokens, which tells degrees apart."
        if any(len(_lengths(model)) <= WIDEST for model in models)
        else ""
    )
    words = (
        f"<p>Five digits hidden in {filler}, asked for at the end of a real input; "
        f"{samples} {'prompts' if samples > 1 else 'prompt'} a cell. Large: share of greedy answers with the exact "
        f"digits.{small}</p>"
    )
    scale = "".join(f'<span style="--level: {level / 4:.2f}">{25 * level}%</span>' for level in range(5))
    legend = f'<p class="scale heat" aria-hidden="true">found {scale}</p>'
    left_out = note(map(escape, measured.left_out("needle")))
    return section("needle", title, words, f'<div class="figures maps">{"".join(maps)}</div>', legend, left_out)


def _lengths(model: Model) -> list[int]:
    return sorted({cell["length"] for cell in model.measured["needle"]["cells"]})


def heat(model: Model) -> str:
    """Lengths across, depths down."""
    found, lengths = model.measured["needle"]["cells"], _lengths(model)
    depths = sorted({cell["depth"] for cell in found})
    at = {(cell["length"], cell["depth"]): cell for cell in found}
    head = "".join(f'<th scope="col">{plots.short(length)}</th>' for length in lengths)
    rows = ""
    for depth in depths:
        row = ""
        for length in lengths:
            cell = at.get((length, depth))
            if cell is None:
                row += "<td></td>"
                continue
            second = f"<small>{cell['logprob']:.2f}</small>" if len(lengths) <= WIDEST else ""
            row += (
                f'<td style="--level: {cell["accuracy"]:.2f}" title="{round(cell["accuracy"] * cell["samples"])} of '
                f'{cell["samples"]}, log probability {cell["logprob"]:.2f}">{cell["accuracy"]:.0%}{second}</td>'
            )
        rows += f'<tr><th scope="row">{depth:.0%}</th>{row}</tr>'
    return (
        f'<div class="scroll" tabindex="0"><table class="heat"><thead><tr><th>depth</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def recall(measured: Measured) -> str:
    """Facts recalled by the length of the input and the distance of the fact; the losses folded."""
    title, models = "Recall", measured.of("recall")
    if not models:
        return section("recall", title, missing("Recall was not measured (<code>--suite recall</code>)."))
    at = [{(cell["length"], cell["distance"]): cell for cell in model.measured["recall"]["cells"]} for model in models]
    shares, losses = [], []
    for length, distance in sorted({place for of_model in at for place in of_model}):
        name, key = f"{length:,} tokens, {distance:,} away", ("recall", str(distance), length)
        shares.append((name, [cells.percent(model, (*key, "recalled"), 0) for model in models]))
        losses.append((name, [_loss(of_model.get((length, distance))) for of_model in at]))
    words = (
        "<p>A fact stated in held-out text and queried at the end of a real input. The answer is read along with the "
        "input, so a model only has to continue: it counts as recalled if every token of it is the most likely one.</p>"
    )
    head, columns = [*map(cells.head, models)], [model.key for model in models]
    return section(
        "recall",
        title,
        words,
        table(head, shares, caption="Percent of facts recalled.", columns=columns),
        note([cells.AS_ABOVE, *map(escape, measured.left_out("recall"))]),
        details("Loss of the answer, nats a token", table(head, losses, columns=columns)),
    )


def _loss(cell: dict | None) -> str:
    return cells.NONE if cell is None else f"{cell['loss']:.3f}"


def virtual(runs: Runs, measured: Measured, figures: Figures) -> str:
    """The virtual-distance probe, after and during training."""
    from endprompt_megatron.report.figures import PAGE, page_palette, virtual_over_training

    title, drawn, models = "Virtual distance", [], measured.of("virtual")
    if models:
        of_suite, palette = measured.as_results("virtual"), page_palette(names_of(models))
        for kind in ("repeat", "continue"):
            drawn.append(
                figures.figure(
                    lambda axes, kind=kind: plots.virtual_distance(axes, of_suite, kind, palette=palette),
                    f"Virtual distance, {kind}",
                )
            )
    probed = [run for run in runs.all if any(line.get("virtual") for line in run.validations)]
    for run in probed:
        name = f", {run.name}" if len(runs.all) > 1 else ""
        drawn.append(
            figures.figure(
                lambda axes, run=run: virtual_over_training(axes, run.validations, PAGE),
                f"Virtual distance over training{name}",
                f"During training{name}: faint at the start, strong at the end.",
            )
        )
    if len(probed) > 1:
        drawn.append(_furthest_over_steps(runs, figures))
    if not drawn:
        return section(
            "virtual", title, missing("The virtual-distance probe was not run, neither in training nor after it.")
        )
    words = (
        "<p>A short input whose last tokens carry far position ids: to the rotary embedding a long input, to the "
        "hardware a short one. Recalling means repeating a passage from before the jump word for word; going on means "
        "plain text across it. The leftmost point has no jump.</p>"
    )
    return section("virtual", title, words, group(drawn), note(map(escape, measured.left_out("virtual"))))


def _furthest_over_steps(runs: Runs, figures: Figures) -> str:
    """The runs' losses at the furthest virtual distance that all of them probe, over the steps."""
    from endprompt_megatron.report.figures import over_steps, page_palette

    keyed = {key: run for key, run in keys_of(runs).items() if any(line.get("virtual") for line in run.validations)}
    probed = {key: [line for line in run.validations if line.get("virtual")] for key, run in keyed.items()}
    common = set.intersection(*(set(line["virtual"]) for lines in probed.values() for line in lines))
    if not common:
        return ""
    furthest = max(common, key=int)
    lines = {}
    for key, of_run in probed.items():
        found = [(line["step"], line["virtual"][furthest]["loss"]) for line in of_run]
        found = [(step, loss) for step, loss in found if loss is not None]
        lines[key] = ([step for step, _ in found], [loss for _, loss in found])
    palette = page_palette({key: run.name for key, run in keyed.items()})
    title = f"Recalling at {int(furthest):,}, while training"
    return figures.figure(lambda axes: over_steps(axes, lines, title, "loss, nats a token", palette, 0.0), title)
