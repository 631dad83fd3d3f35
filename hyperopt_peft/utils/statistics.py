"""Means of few numbers, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from scipy.stats import sem, t


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % t-interval; infinite for one value.

    Example:
        >>> mean, half = mean_and_half([0.70, 0.72, 0.74])
        >>> f"{mean:.2f} ± {half:.2f}"
        '0.72 ± 0.05'
    """
    if len(values) < 2:
        return fmean(values), math.inf
    return fmean(values), float(t.ppf(0.975, len(values) - 1) * sem(values))


def is_tie(values: Sequence[float]) -> bool:
    """Whether the 95 % interval of the mean contains 0; always true for equal values.

    Example:
        >>> is_tie([0.1, 0.2, 0.15]), is_tie([0.1, -0.2, 0.15]), is_tie([0.001, 0.001])
        (False, True, True)
    """
    mean, half = mean_and_half(values)
    return abs(mean) <= half or half < 1e-9  # the values are equal up to rounding


def detectable(values: Sequence[float]) -> float:
    """The smallest true mean difference that this many pairs detect with probability 0.8.

    It is (t_0.975 + t_0.8)·s/√n, s the standard deviation of ``values``; infinite for one value.

    Example:
        >>> f"{detectable([0.70, 0.72, 0.74]):.3f}"
        '0.062'
    """
    if len(values) < 2:
        return math.inf
    freedom = len(values) - 1
    return float((t.ppf(0.975, freedom) + t.ppf(0.8, freedom)) * sem(values))
