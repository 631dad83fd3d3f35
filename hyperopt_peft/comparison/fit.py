"""The rate at which a quadratic fit of noisy scores is highest."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import median

import numpy as np


def peak(rates: Sequence[float], scores: Sequence[float]) -> float:
    """The rate of the grid at which a quadratic c₀ + c₁·log r + c₂·(log r)² is highest.

    The fit averages noise that the best of the scores would follow. Training falls off a cliff at
    rates that are too high, which no quadratic follows: a rate above the best one that scores worse
    than the median of the rates up to it is left out, if three lower ones are there.
    ``python benchmarks/methods calibration`` shows what this is worth.

    Args:
        rates: the grid, in any order and unit.
        scores: one for each rate, higher is better; ones that are not finite are left out.

    Returns:
        One of ``rates``. Of fewer than three finite scores the rate of the best one.

    Raises:
        ValueError: no score is finite.

    Example:
        >>> peak([1e-4, 1e-3, 1e-2, 1e-1, 1.0], [0.60, 0.71, 0.76, 0.77, 0.50])
        0.1
    """
    pairs = sorted((r, s) for r, s in zip(rates, scores, strict=True) if isfinite(s))
    best = max(range(len(pairs)), key=lambda i: pairs[i][1])
    floor = median(score for _, score in pairs[: best + 1])
    kept = [p for i, p in enumerate(pairs) if i <= max(best, 2) or p[1] >= floor]
    if len(kept) < 3:
        return pairs[best][0]
    grid, values = np.array(kept).T
    values /= abs(values).max() or 1.0
    fit = np.polynomial.Polynomial.fit(np.log(grid), values, 2)
    return float(grid[np.argmax(fit(np.log(grid)).round(9))])  # of equal ones the lowest rate
