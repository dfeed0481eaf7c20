"""An evaluation from its settings to results.json: ask what is not answered yet, then put the answers together.

Any number of processes do parts of it in one directory (split.py), each answer is stored at once (store.py), and the
process that finds all parts complete makes the tables.  results.json holds everything that is needed to repeat them:
models, text, lengths, seeds, versions, times.
"""

import gc
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from endprompt_megatron import __version__
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors, read_json, write_json, write_text
from endprompt_megatron.common.plotting import PAPER
from endprompt_megatron.evaluate import store
from endprompt_megatron.evaluate.engines.base import Engine
from endprompt_megatron.evaluate.intervals import Series, comparisons
from endprompt_megatron.evaluate.preparation import Inputs, Model, prepare
from endprompt_megatron.evaluate.registry import BASELINE, EXTENDED, Drawing, Settings, suites_in
from endprompt_megatron.evaluate.request_progress import RequestProgress
from endprompt_megatron.evaluate.requests import Request, Response, ask
from endprompt_megatron.evaluate.split import Alone, ModelRanks, Part

OpenEngine = Callable[[Model], Engine]


def evaluate(
    settings: Settings,
    models: dict[str, Model],
    out: Path,
    open_engine: OpenEngine,
    *,
    ranks: Alone | ModelRanks | None = None,
    progress: RequestProgress | None = None,
    merge: bool = False,
) -> dict | None:
    """Ask this process's part, and write `out`/results.json and the plots if nothing is left to ask by anyone.

    `models`: the extended one, and the baseline before it if there is one.  `merge`: ask nothing.  Returns the
    results, None where other parts are not complete yet or another rank writes.  Killed and called again, it goes on.
    Raises InputError.
    """
    ranks, progress = ranks or Alone(Part()), progress or RequestProgress(shown=False)
    with ranks.same_errors():
        store.refuse_foreign(out)
        inputs = prepare(settings, models)
        identity = {"engine": settings.engine, "dtype": settings.dtype, "models": inputs.fingerprints}
        store.open_state(out, identity, write=False)
    for what, reason in inputs.left_out.items():
        progress.note(f"{what} is left out: {reason}")
    if not merge:
        for label in models:
            _ask(inputs, label, out, identity, open_engine, ranks, progress)
        ranks.wait()
        if not ranks.first:
            return None
    counts = {label: store.complete_count(out, label, inputs.job(label)) for label in models}
    for label, count in counts.items():
        if count is None and merge:
            raise InputError(f"--merge: {store.what_is_missing(out, label, inputs.job(label))}")
    return None if None in counts.values() else _put_together(inputs, out, counts)


def _ask(
    inputs: Inputs,
    label: str,
    out: Path,
    identity: dict,
    open_engine: OpenEngine,
    ranks: Alone | ModelRanks,
    progress: RequestProgress,
) -> None:
    """Have the model answer what it has not answered yet of this process's part, and store that."""
    job, print_of_model = inputs.job(label), inputs.fingerprints[label]
    if ranks.all(store.is_complete(out, label, ranks.part, job)):
        return
    stored = store.Answers(out, label, ranks.part)
    known = ranks.agree(set(stored.places))
    asked: list[tuple[int, str, Request]] = []  # without their inputs, which would fill the memory
    keys: dict[int, str] = {}
    later: list[Request] = []
    progress.begin(label, inputs.expected(label), ranks.part.count)

    def waiting() -> Iterator[Request]:
        for place, request in enumerate(inputs.requests(label)):
            if not ranks.part.has(place):
                continue
            key = request.key(print_of_model)
            asked.append((place, key, replace(request, ask=None, prompt=None, read=None, content=b"")))
            if key in known:
                progress.known(request)
                continue
            keys[id(request)] = key
            if request.alone:
                later.append(request)
            else:
                yield request

    def keep(request: Request, record: dict, began: float) -> float:
        now = time.monotonic()
        key = keys.pop(id(request))
        if ranks.leads:
            stored.add(key, request, record, now - began)
        progress.answered(request)
        return now

    try:
        engine = None
        requests = waiting()
        # What is answered already needs no model; but ranks that hold one together load it together.
        first = None if ranks.together else next(requests, None)
        if ranks.together or first is not None:
            progress.say(f"loading {label}")
            with ranks.same_errors():
                engine = open_engine(inputs.models[label])
        if ranks.leads:
            store.open_state(out, identity, write=True)
        began = time.monotonic()
        if engine is not None:
            if ranks.leads:
                write_json(out / "answers" / f"{label}.json", engine.describe())
            for request, record in ask(engine, _with_first(first, requests)):
                began = keep(request, record, began)
            # Two models of 8B side by side would not fit: the first goes before the second comes.
            engine = None
            gc.collect()
        for request in later:
            progress.say(f"{label} {request.suite} {request.task}")
            began = keep(request, request.ask(None), began)
        if ranks.leads:
            store.write_asked(out, label, ranks.part, job, asked)
    finally:
        stored.close()


def _with_first(first: Request | None, others: Iterator[Request]) -> Iterator[Request]:
    if first is not None:
        yield first
    yield from others


def _put_together(inputs: Inputs, out: Path, counts: dict[str, int]) -> dict:
    """Results of all parts' answers, written to `out`."""
    settings = inputs.settings
    results: dict = {
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": settings.as_dict(),
        "text": inputs.text.describe() if inputs.text else None,
        "models": {},
        "left_out": inputs.left_out,
        "measurements": {},
        "scores": {},
    }
    series: dict[str, list[Series]] = {}
    total = 0.0
    for label, count in counts.items():
        by_suite: dict[str, list[Response]] = {suite: [] for suite in settings.suites}
        seconds = dict.fromkeys(settings.suites, 0.0)
        for response, taken in store.responses(out, label, count):
            by_suite[response.suite].append(response)
            seconds[response.suite] += taken
        results["models"][label] = _described(inputs.models[label], out / "answers" / f"{label}.json")
        measured = {suite: inputs.prepared[label, suite].result(responses) for suite, responses in by_suite.items()}
        measured["seconds"] = {suite: round(taken, 2) for suite, taken in seconds.items()}
        results["measurements"][label] = measured
        series[label] = [
            each for suite, responses in by_suite.items() for each in inputs.prepared[label, suite].series(responses)
        ]
        results["scores"][label] = [each.score() for each in series[label]]
        total += sum(seconds.values())
    if BASELINE in series:
        results["comparisons"] = comparisons(series[BASELINE], series[EXTENDED])
    results["seconds"] = round(total, 2)
    results["versions"] = _versions()
    values = {label: [each.raw() for each in of_model] for label, of_model in series.items()}
    _write(results, values, out)
    return results


def _described(model: Model, said: Path) -> dict:
    """What the engine said of its model; what the config says where none was needed."""
    if said.exists():
        return read_json(said, "what an engine said of its model")
    return {"path": str(model.weights), "window": model.window}


def _write(results: dict, values: dict, out: Path) -> None:
    with disk_errors(out, "--out"), tempfile.TemporaryDirectory(prefix=".plots-", dir=out) as staging:
        _write_plots(results, Path(staging))
        for plot in Path(staging).iterdir():
            os.replace(plot, out / plot.name)
        write_text(out / "values.json", json.dumps({"format": 1, **values}) + "\n")
        write_json(out / "results.json", results)


def _write_plots(results: dict, directory: Path) -> None:
    """NAME.png for each suite that draws, its pictures side by side."""
    for suite in suites_in(results):
        drawings = suite.drawings(results)
        if drawings:
            _draw(directory / f"{suite.name}.png", results, drawings)


def _draw(path: Path, results: dict, drawings: list[Drawing]) -> None:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(5.2 * len(drawings), 3.4), layout="constrained")
    for axes, drawing in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        drawing.draw(axes, results, PAPER)
    figure.savefig(path, dpi=150)


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
