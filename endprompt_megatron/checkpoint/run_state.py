"""The state of a run: what a save stores and a resume restores."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunState:
    """What training changes on this rank, and what it reads.

    `models`: the chunks of the model, wrapped or not.  `data`: on the first rank, what the run trains on
    (data/samples/identity.py).  `base`: there too, whose frozen weights checkpoints leave out (convert/over_base.py).
    """

    models: list
    optimizer: Any
    scheduler: Any
    data: list[dict] | None = None
    base: dict | None = None


@dataclass
class Progress:
    """How far a run is, and what it lost if checkpoints were damaged when it resumed."""

    step: int = 0
    consumed_samples: int = 0
    lost: list[dict] = field(default_factory=list)
