"""The virtual-distance suite: method/virtual_probe.py asked of an engine, a request for each kind and distance."""

from collections.abc import Iterator

import numpy as np

from endprompt_megatron.evaluate.engines.base import Engine
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.requests import Answered, Entry, Item, content_of
from endprompt_megatron.method.virtual_probe import KINDS, default_distances, probe_inputs, summarise

__all__ = ["KINDS", "default_distances", "items", "probe_inputs", "result", "series"]


def items(probes: dict[str, list[dict]]) -> Iterator[Item]:
    """An item a kind and distance.  `probes`: what `probe_inputs` gave, by kind."""
    for kind, of_kind in probes.items():
        for probe in of_kind:
            tokens, positions, scored = probe["tokens"], probe["position_ids"], probe["scored"]

            def ask(
                engine: Engine, tokens: np.ndarray = tokens, positions: np.ndarray = positions, scored=scored
            ) -> dict:
                first = int(scored.any(axis=0).argmax())
                losses, correct = engine.token_losses(tokens, positions, last=scored.shape[1] - first)
                rows = [summarise(*row) for row in zip(losses, correct, scored[:, first:], strict=True)]
                return {key: [row[key] for row in rows] for key in ("loss", "accuracy")}

            notes = {"physical": tokens.shape[1], "samples": tokens.shape[0]}
            entry = Entry("virtual", kind, probe["distance"], 0, notes)
            yield Item(entry, content_of(tokens, positions, scored), tokens.size, ask)


def result(pairs: list[Answered]) -> dict:
    """{"physical", "samples", kind: {distance: {loss, accuracy}}}."""
    first = pairs[0][0].notes
    found: dict = {"physical": first["physical"], "samples": first["samples"]}
    for entry, record in pairs:
        # Every row has as many scored places, so the mean of the rows' means is that of all places.
        values = {key: float(np.mean(rows)) for key, rows in record.items()}
        found.setdefault(entry.task, {})[str(entry.length)] = values
    return found


def series(pairs: list[Answered]) -> list[Series]:
    """Loss and accuracy of the rows, by kind and distance."""
    return [
        Series("virtual", entry.task, entry.length, metric, (np.asarray(record[metric]),))
        for entry, record in pairs
        for metric in ("loss", "accuracy")
    ]
