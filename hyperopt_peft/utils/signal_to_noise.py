"""The signal-to-noise ratio of noisy estimates of one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.vector import Vector, inner

#: The fewest vectors for which a ratio below 1 is a reason to warn.
MIN_SAMPLES = 4
#: Advice for a ratio below 1.
ADVICE = "a larger batch of either level, fewer upper variables, or a prior"


class SignalToNoise:
    """signal/noise for one vector g_r, from R vectors with mean ḡ; both squares are unbiased.

        noise²  = Σ_r ‖g_r − ḡ‖² / (R − 1)
        signal² = max(0, ‖ḡ‖² − noise²/R)        since ‖ḡ‖² alone is too large by noise²/R

    Welford's sums (1962, doi:10.2307/1266577) need one vector and one scalar on the device.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Vector | None = None
        self._spread: Tensor | None = None  # Σ ‖g_r − ḡ‖²

    def add(self, parts: Iterable[Tensor]) -> None:
        """Add the vector with ``parts``; nothing is read from the device."""
        vector = Vector(parts)
        self.count += 1
        if self._mean is None:
            self._mean = vector
            return
        vector.add_(self._mean, -1.0)
        spread = inner(vector, vector) * (1 - 1 / self.count)
        self._spread = spread if self._spread is None else self._spread + spread
        self._mean.add_(vector, 1 / self.count)

    def read(self) -> float | None:
        """The ratio; the vectors are forgotten afterwards.

        It is ∞ without noise, and None for fewer than two vectors or zeros. Reads the device once.
        """
        count, mean, spread = self.count, self._mean, self._spread
        self.count, self._mean, self._spread = 0, None, None
        if mean is None or spread is None:
            return None
        length, scatter = to_floats([inner(mean, mean), spread])
        noise = scatter / (count - 1)
        signal = max(0.0, length - noise / count)
        if noise == 0:
            return math.inf if signal else None
        return math.sqrt(signal / noise)
