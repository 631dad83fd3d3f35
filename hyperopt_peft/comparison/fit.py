"""The best rate of a grid by noisy scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def peak(rates: Sequence[float], scores: Sequence[float]) -> float:
    """The rate of the best value of a quadratic fit of ``scores`` over the logarithm of the rate."""
    finite = np.isfinite(scores)
    x, y = np.log(np.asarray(rates))[finite], np.asarray(scores)[finite]
    if len(x) > 3:
        y = np.polyval(np.polyfit(x, y, 2), x)
    return float(np.asarray(rates)[finite][int(np.argmax(y))])
