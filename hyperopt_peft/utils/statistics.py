"""Means of few numbers, with what they cannot decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.stats import t


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half its 95 % interval by Student's t; infinite for one value.

    Example:
        >>> mean, half = mean_and_half([0.70, 0.72, 0.74])
        >>> f"{mean:.2f} ± {half:.2f}"
        '0.72 ± 0.05'
    """
    if len(values) < 2:
        return fmean(values), math.inf
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * error_of(values)


def is_tie(values: Sequence[float]) -> bool:
    """Whether 0 is in the interval of the mean; equal values have none that decides.

    Example:
        >>> is_tie([0.1, 0.2, 0.15]), is_tie([0.1, -0.2, 0.15]), is_tie([0.001, 0.001])
        (False, True, True)
    """
    mean, half = mean_and_half(values)
    return abs(mean) <= half or half < 1e-9  # of equal differences, up to rounding


def error_of(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return stdev(values) / math.sqrt(len(values))


def detectable(values: Sequence[float]) -> float:
    """The smallest mean difference that as many pairs show in four of five repetitions.

    That is (t_0.975 + t_0.8)·s/√n with s the standard deviation of ``values``; infinite for one.

    Example:
        >>> f"{detectable([0.70, 0.72, 0.74]):.3f}"
        '0.062'
    """
    if len(values) < 2:
        return math.inf
    freedom = len(values) - 1
    return float(t.ppf(0.975, freedom) + t.ppf(0.8, freedom)) * error_of(values)
