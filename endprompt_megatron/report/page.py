"""One self-contained HTML page of a run: what was trained, what it cost, what it changed, what is not shown.

Reads RUN/recipe.yaml, metrics.jsonl, data_seen.json and evaluation/results.json; a section whose file is missing says
so, or is left out where older runs have no such file.  The page fetches nothing: style and pictures are inside.
"""

import re
from html import escape
from pathlib import Path

from endprompt_megatron import __version__
from endprompt_megatron.evaluate.plots import of_suite
from endprompt_megatron.files import disk_errors, write_text
from endprompt_megatron.report.evaluation import passkey, results, text_quality, virtual
from endprompt_megatron.report.html import Figures, group, missing
from endprompt_megatron.report.run import Run, distance_coverage, read_run
from endprompt_megatron.report.style import CSS


def write_report(directory: Path, control: Path | None = None) -> Path:
    """Write RUN/report.html and return its path.  Raises InputError (see read_run)."""
    run = read_run(directory, control)
    path = directory / "report.html"
    with disk_errors(path, "RUN"):
        write_text(path, page(run))
    return path


def page(run: Run) -> str:
    """The whole page as HTML."""
    figures = Figures()
    body = "\n".join(
        [
            header(run),
            results(run),
            text_quality(run, figures),
            passkey(run),
            virtual(run, figures),
            training(run, figures),
            data_seen(run),
            distances(run, figures),
            not_shown(run),
            provenance(run),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)}: long-context extension</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def header(run: Run) -> str:
    """Name, the recipe in words, and the few numbers one asks for first."""
    get = run.value
    method, target, physical = (get(f"context.{key}") for key in ("method", "target", "physical"))
    if isinstance(target, int) and isinstance(physical, int):
        original = get("context.original")
        reach = f"from {original:,} to {target:,} tokens" if isinstance(original, int) else f"to {target:,} tokens"
        rope = f"{get('context.rope.type', 'linear')} RoPE scaling"
        words = (
            f"{escape(str(get('model.hf', 'The model')))}, extended {reach} with <code>{escape(str(method))}</code> "
            f"on sequences of {physical:,} tokens, {escape(rope)}."
        )
        optim = [f"Peak learning rate {get('optim.lr'):g}"] if isinstance(get("optim.lr"), float) else []
        optim += [f"{get('train.global_batch_size')} sequences a step"] if get("train.global_batch_size") else []
        optim += [str(get("precision.dtype"))] if get("precision.dtype") else []
        words += f" {escape(', '.join(optim))}." if optim else ""
        lead = f'<p class="lead">{words}</p>'
    else:
        lead = missing("The run has no readable <code>recipe.yaml</code>.")
    facts = []
    if run.steps:
        last = run.steps[-1]
        facts.append(("steps", f"{last['step']:,}"))
        if last.get("consumed_tokens"):
            facts.append(("tokens", f"{last['consumed_tokens']:,}"))
        for name, key, form in (
            ("last context loss", "loss_context", "{:.3f}"),
            ("tokens a second", "tokens_per_s", "{:,.0f}"),
            ("memory a process", "memory_gib", "{:.1f} GiB"),
        ):
            value = run.final(key)
            if value is not None:
                facts.append((name, form.format(value)))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return (
        f'<header><p class="kind">Long-context extension, one run</p><h1>{escape(run.name)}</h1>{lead}'
        + (f'<dl class="facts">{listed}</dl>' if facts else "")
        + "</header>"
    )


def training(run: Run, figures: Figures) -> str:
    """Losses large; learning rate, gradient norm, speed and memory small."""
    from endprompt_megatron.report.plots import PAGE, losses, small

    title = "<h2>Training</h2>"
    if not run.steps:
        return title + missing("The run has no <code>metrics.jsonl</code> with logged steps.")
    prompted = any(isinstance(line.get("loss_prompt"), (int, float)) for line in run.steps)
    by_heart = " The prompts are a few fixed texts: their loss soon falls by memory alone."
    large = figures.figure(
        lambda axes: losses(axes, run.steps, run.validations, PAGE),
        "Loss over training",
        "Faint: each logged step. Strong: smoothed." + (by_heart if prompted else ""),
        (8.0, 3.3),
    )
    panels = []
    for key, name, unit in (
        ("lr", "Learning rate", ""),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("tokens_per_s", "Speed", "tokens a second"),
        ("memory_gib", "Memory", "GiB, peak of the first process"),
    ):
        if any(isinstance(line.get(key), (int, float)) for line in run.steps):
            panels.append(
                figures.figure(
                    lambda axes, key=key, name=name, unit=unit: small(axes, run.steps, key, name, unit, PAGE),
                    name,
                    size=(3.6, 2.3),
                )
            )
    skipped = max((line.get("skipped_steps") or 0 for line in run.steps), default=0)
    held = [line for line in run.validations if isinstance(line.get("valid_loss"), (int, float))]
    notes = []
    if held:
        notes.append(f"Validation loss at step {held[-1]['step']:,}: {held[-1]['valid_loss']:.4f}.")
    else:
        notes.append("No validation was run.")
    if skipped:
        notes.append(f"{skipped} updates were skipped because a loss or gradient was not finite.")
    return f"{title}<p>{' '.join(notes)}</p>{large}{group(panels, small=True)}"


def data_seen(run: Run) -> str:
    """What training read of each source; nothing for a run that did not write it down."""
    if not run.seen:
        return ""
    columns = (
        ("samples", "samples", "{:,}"),
        ("share", "share", "{:.1%}"),
        ("context_tokens", "context tokens", "{:,}"),
        ("prompt_tokens", "prompt tokens", "{:,}"),
        ("epochs", "epochs", "{:.2f}"),
    )
    head = "".join(f"<th>{name}</th>" for _, name, _ in columns)
    rows = []
    for source in run.seen:
        cells = "".join(f"<td>{form.format(source[key])}</td>" for key, _, form in columns)
        rows.append(f"<tr><th>{escape(str(source['prefix']))}</th>{cells}</tr>")
    return (
        '<h3>Data seen</h3><div class="scroll"><table><caption>Up to the newest checkpoint.</caption>'
        f"<thead><tr><th>source</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def distances(run: Run, figures: Figures) -> str:
    """Which relative distances the training saw."""
    from endprompt_megatron.report.plots import PAGE, coverage

    title = "<h2>Distances trained</h2>"
    found = distance_coverage(run)
    if found is None:
        return title + missing("The recipe does not say which distances were trained.")
    counts, gaps, prompt = found
    target = len(counts)
    unseen = sum(high - low + 1 for low, high in gaps)
    words = f"Of the {target:,} relative distances in the target window, {unseen / target:.0%} "
    words += "were never supervised" if unseen else "(none) were left out"
    if gaps:
        low, high = max(gaps, key=lambda gap: gap[1] - gap[0])
        words += f", the largest gap being {low:,} to {high:,}; there the model rests on the smoothness of scaled RoPE"
    prompted = str(run.value("context.method")).startswith("end_prompt")
    words += f". Terminal prompt: {prompt} tokens." if prompted else "."
    drawn = figures.figure(
        lambda axes: coverage(axes, counts, gaps, PAGE), "Relative distances in training", size=(8.0, 2.9)
    )
    return f"{title}<p>{words}</p>{drawn}"


def not_shown(run: Run) -> str:
    """The limits of what this page says, as far as they follow from what was run."""
    points, target = [], run.value("context.target")
    method = str(run.value("context.method"))
    if run.evaluation is None:
        points.append(
            "Whether the model reads long inputs: nothing was evaluated, and a training loss does not say it."
        )
    else:
        settings = run.evaluation.get("settings", {})
        lengths = [*settings.get("lengths", []), *(settings.get("needle_lengths") or [])]
        if lengths and isinstance(target, int) and max(lengths) < target:
            points.append(
                f"Real inputs between {max(lengths):,} and {target:,} tokens. Virtual lengths reach further, but there "
                "only a short input's tokens compete for attention."
            )
        cells = [cell for _, measured in of_suite(run.evaluation, "needle") for cell in measured["cells"]]
        if cells and max(cell["samples"] for cell in cells) < 20:
            most = max(cell["samples"] for cell in cells)
            prompts = f"{most} prompts a cell say" if most > 1 else "one prompt a cell says"
            points.append(f"Passkey accuracy to the percent: {prompts} only roughly.")
        if settings.get("windows", 2) < 5 and of_suite(run.evaluation, "perplexity"):
            points.append(
                "Other texts: perplexity comes from a few stretches of one held-out text, "
                "and differences of a few hundredths in the loss may be chance."
            )
        if "baseline" not in run.evaluation["measurements"]:
            points.append("What the model did before: no baseline was measured.")
        points.append(
            "Questions, summaries, retrieval among distractors: RULER, LongBench and short-text tests were not run."
        )
    if run.control is None and method.startswith("end_prompt"):
        points.append(
            "What the terminal prompt contributes: no control was given. The same training without it (method "
            "<code>short</code>) has to stand beside this run before anything is credited to the prompt."
        )
    if run.control is not None:
        other, mine = run.control.final("loss_context"), run.final("loss_context")
        pair = f" Last context loss: control {other:.3f}, this run {mine:.3f}." if None not in (other, mine) else ""
        points.append(
            f"More than the table's difference between this run and its control, {escape(run.control.name)} "
            f"(<code>{escape(str(run.control.value('context.method', 'unknown')))}</code>).{pair}"
        )
    listed = "".join(f"<li>{point}</li>" for point in points)
    return f"<h2>What is not shown</h2><ul>{listed}</ul>"


def provenance(run: Run) -> str:
    """The recipe, and how the evaluation can be repeated."""
    parts = ["<h2>How it was made</h2>"]
    if run.recipe_text:
        text = escape(run.recipe_text.strip())
        parts.append(f"<details><summary>recipe.yaml, as resolved</summary><pre>{text}</pre></details>")
    if run.evaluation is not None:
        import yaml

        kept = {
            key: run.evaluation.get(key) for key in ("created", "seconds", "settings", "text", "models", "versions")
        }
        text = escape(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip())
        parts.append(f"<details><summary>Evaluation: settings, models, versions</summary><pre>{text}</pre></details>")
    parts.append(f"<footer>endprompt_megatron {escape(__version__)}. {escape(str(run.directory))}</footer>")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))
