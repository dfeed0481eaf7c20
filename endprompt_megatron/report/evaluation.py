"""The report's sections on what the model can do: results, held-out text, passkey, virtual distance."""

from html import escape

from endprompt_megatron.evaluate import plots
from endprompt_megatron.evaluate.plots import of_suite
from endprompt_megatron.evaluate.tables import loss_text, perplexity_text
from endprompt_megatron.report.html import Figures, group, missing
from endprompt_megatron.report.run import Run

ORDER = ("baseline", "untrained", "control", "extended")
EVALUATE = "python tools/evaluate.py --hf RUN/hf --baseline DIR --lengths 4096,8192 --text FILE --out RUN/evaluation"


def ordered(measured: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Baseline first, extended last."""
    return sorted(measured, key=lambda pair: ORDER.index(pair[0]) if pair[0] in ORDER else 0)


def named(label: str) -> str:
    """A model's name in a sentence or a table head."""
    return escape(plots.LABELS.get(label, label))


def results(run: Run) -> str:
    """The table one would quote."""
    title = "<h2>Results</h2>"
    if run.evaluation is None:
        return title + missing(f"No evaluation yet. Run <code>{escape(EVALUATE)}</code>, then this report again.")
    rows = []
    quality = ordered(of_suite(run.evaluation, "perplexity"))
    labels = [label for label, _ in ordered(list(run.evaluation["measurements"].items()))]
    columns = dict(quality)
    if quality:
        for place, entry in enumerate(quality[0][1]["by_length"]):
            cells = {label: perplexity_cell(measured["by_length"][place]) for label, measured in quality}
            rows.append((f"Perplexity, {entry['length']:,} tokens", cells))
    keys = ordered(of_suite(run.evaluation, "needle"))
    for length in sorted({cell["length"] for _, measured in keys for cell in measured["cells"]}):
        cells = {}
        for label, measured in keys:
            answers = [answer for cell in measured["cells"] if cell["length"] == length for answer in cell["answers"]]
            cells[label] = f"{sum(answer['correct'] for answer in answers)} of {len(answers)}"
        rows.append((f"Passkeys found, {length:,} tokens", cells))
    probes = ordered(of_suite(run.evaluation, "virtual"))
    if probes:
        furthest = list(probes[0][1]["repeat"])[-1]
        cells = {label: f"{measured['repeat'][furthest]['accuracy']:.0%}" for label, measured in probes}
        rows.append((f"Recalled at virtual length {int(furthest):,}", cells))
    head = "".join(f'<th scope="col">{named(label)}</th>' for label in labels)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="{escape(label)}">{cells.get(label, "–")}</td>' for label in labels)
        + "</tr>"
        for name, cells in rows
    )
    note = ""
    if columns:
        first = quality[0][1]
        windows = len(first["by_length"][0]["windows"])
        note = (
            f"Perplexity of the last {first['scored']} tokens of {windows} held-out "
            f"{'inputs' if windows > 1 else 'input'} of that real length; all lengths score the same tokens. "
        )
    note += "".join(f"Left out: {escape(text)}. " for text in run.evaluation.get("left_out", []))
    return (
        f'{title}<div class="scroll"><table><thead><tr><th scope="col"></th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{note}</p>'
    )


def perplexity_cell(entry: dict) -> str:
    """Perplexity, with the loss and its error as a tooltip."""
    return f'<span title="loss {loss_text(entry)}">{perplexity_text(entry["perplexity"])}</span>'


def text_quality(run: Run, figures: Figures) -> str:
    """Perplexity by length and by position."""
    title = "<h2>Held-out text</h2>"
    if run.evaluation is None or not of_suite(run.evaluation, "perplexity"):
        return title + missing("Perplexity was not measured.")
    from endprompt_megatron.report.plots import PAGE

    evaluation = run.evaluation
    drawn = [
        figures.figure(lambda axes: plots.by_length(axes, evaluation, PAGE), "Perplexity by length"),
        figures.figure(lambda axes: plots.by_position(axes, evaluation, PAGE), "Perplexity by position"),
    ]
    return (
        f"{title}<p>Real inputs, read whole. A model that uses its context gets better to the right; one past its "
        f"window collapses.</p>{group(drawn)}"
    )


def passkey(run: Run) -> str:
    """Heat maps of the passkey, one table a model."""
    title = "<h2>Passkey</h2>"
    measured = ordered(of_suite(run.evaluation, "needle")) if run.evaluation else []
    if not measured:
        return title + missing("Passkey retrieval was not measured.")
    tables = "".join(f"<figure><h3>{named(label)}</h3>{heat(result['cells'])}</figure>" for label, result in measured)
    filler = {"noise": "repeated noise sentences", "text": "held-out text"}[measured[0][1]["filler"]]
    samples = measured[0][1]["cells"][0]["samples"]
    words = (
        f"Five digits hidden in {filler}, asked for at the end of a real input; "
        f"{samples} {'prompts' if samples > 1 else 'prompt'} a cell. Large: share of greedy answers with the exact "
        "digits. Small: mean log probability of the key's tokens."
    )
    return f"{title}<p>{words}</p>{group([tables], small=True)}"


def heat(cells: list[dict]) -> str:
    """Lengths across, depths down."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    at = {(cell["length"], cell["depth"]): cell for cell in cells}
    head = "".join(f'<th scope="col">{plots.short(length)}</th>' for length in lengths)
    rows = ""
    for depth in depths:
        row = ""
        for length in lengths:
            cell = at.get((length, depth))
            if cell is None:
                row += "<td></td>"
                continue
            row += (
                f'<td style="--level: {cell["accuracy"]:.2f}">{cell["accuracy"]:.0%}'
                f"<small>{cell['logprob']:.2f}</small></td>"
            )
        rows += f'<tr><th scope="row">{depth:.0%} deep</th>{row}</tr>'
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def virtual(run: Run, figures: Figures) -> str:
    """The virtual-distance probe, after and during training."""
    from endprompt_megatron.report.plots import PAGE, virtual_over_training

    title, drawn = "<h2>Virtual distance</h2>", []
    evaluation = run.evaluation
    if evaluation is not None and of_suite(evaluation, "virtual"):
        for kind in ("repeat", "continue"):
            drawn.append(
                figures.figure(
                    lambda axes, kind=kind: plots.virtual_distance(axes, evaluation, kind, palette=PAGE),
                    f"Virtual distance, {kind}",
                )
            )
    if any(line.get("virtual") for line in run.validations):
        drawn.append(
            figures.figure(
                lambda axes: virtual_over_training(axes, run.validations, PAGE), "Virtual distance over training"
            )
        )
    if not drawn:
        return title + missing("The virtual-distance probe was not run, neither in training nor after it.")
    return (
        f"{title}<p>A short input whose last tokens carry far position ids: to the rotary embedding a long input, "
        "to the hardware a short one. Recalling means repeating a passage from before the jump word for word; going on "
        f"means plain text across it. The leftmost point has no jump.</p>{group(drawn)}"
    )
