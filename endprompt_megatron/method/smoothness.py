"""How fast RoPE attention scores can change with the distance: the paper's equation 3 for given frequencies.

Between a query and a key at distance d the score is S(d) = sum_j a_j cos(w_j d + phi_j) (equations 1 and 2): content
sets the amplitudes and phases, the position encoding the angular frequencies w_j, in radians a token.  Whatever the
content, the highest frequency w bounds the score (Bernstein's inequality, equation 3):

    sup|S'| <= w sup|S|        sup|S''| <= w^2 sup|S|

Position interpolation by s divides every w_j, so the first bound by s and the second by s^2.  numpy only; rope.py has
the frequencies of a recipe.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Smoothness:
    """Bounds of scores with these `frequencies`, float64 [d/2], all positive, in radians a token."""

    frequencies: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError for frequencies that are none."""
        found = np.asarray(self.frequencies, dtype=np.float64)
        if found.ndim != 1 or not len(found) or not (np.isfinite(found) & (found > 0)).all():
            raise ValueError("frequencies should be positive numbers, one a pair of rotary dimensions")
        object.__setattr__(self, "frequencies", found)

    @property
    def slope(self) -> float:
        """Most that S changes a token, as a multiple of sup|S| (equation 3, left)."""
        return float(self.frequencies.max())

    @property
    def curvature(self) -> float:
        """Most that S' changes a token, as a multiple of sup|S| (equation 3, right)."""
        return self.slope**2

    @property
    def swing(self) -> float:
        """Fewest tokens in which S can go from its least possible value to its greatest: half the shortest wave."""
        return math.pi / self.slope

    @property
    def wavelengths(self) -> np.ndarray:
        """Tokens of a full turn of each pair of dimensions.  float64 [d/2]."""
        return 2 * math.pi / self.frequencies

    def slope_of(self, amplitudes: np.ndarray) -> float:
        """Most that S changes a token where the amplitudes [d/2] are known: sum_j |a_j| w_j."""
        return float(np.abs(amplitudes) @ self.frequencies)

    def change(self, distance: float) -> float:
        """Most that S differs between two places `distance` tokens apart, as a multiple of sup|S|.

        2 sin(w distance / 2), and 2 from `swing` on, where the bound says no more than that S is bounded.  This is
        equation 3 for a finite step (Bernstein's and Nikolskii's inequality for functions of exponential type).
        """
        return 2 * math.sin(min(self.slope * distance, math.pi) / 2)

    def turning_within(self, distance: float) -> float:
        """Share of the pairs that go through all their phases in `distance` tokens."""
        return float((self.wavelengths <= distance).mean())

    def turning_once(self, distance: float) -> float:
        """Share of the pairs whose half wave is longer than `distance`: they turn at most once across it."""
        return float((self.wavelengths / 2 > distance).mean())
