"""How far a run is: what a save stores beside the state, and a resume gives back."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a run is, and what it lost if checkpoints were damaged when it resumed."""

    step: int = 0
    consumed_samples: int = 0
    lost: list[dict] = field(default_factory=list)
