"""A confidence interval of Spearman's rank correlation that holds for few retrainings too."""

from __future__ import annotations

import math
from functools import cache
from itertools import permutations

import numpy as np
from scipy.optimize import brentq

#: Pairs below which the interval is from the exact distribution over all orders.
EXACT_BELOW = 10
#: The probability that is left outside at each end.
TAIL = 0.025


def interval(rho: float, count: int) -> tuple[float, float]:
    """A 95 % interval of the rank correlation that ``count`` pairs have on average.

    Below 10 pairs the interval is exact, for orders π of the actual values (against those of the
    predicted ones) with probability P_θ(π) ∝ exp(θ·ρ(π)), the ranking model of Mallows 1957
    (doi:10.1093/biomet/44.1-2.114) for Spearman's ρ: θ = 0 is the permutation distribution, and θ
    → ∞ the perfect order. Its ends are E_θ[ρ] for the two θ under which ρ or a larger value, and ρ
    or a smaller value, have probability 2.5 % (Clopper & Pearson 1934,
    doi:10.1093/biomet/26.4.404). So five pairs in perfect order only say that ρ is above .31.

    From 10 pairs the interval is Fisher's transformation with the variance (1 + ρ²/2)/(n − 3) of
    Bonett & Wright 2000 (doi:10.1007/BF02294183); a perfect order counts as half an exchange of
    neighbours away from it, ρ = 1 − 6/(n³ − n).

    Args:
        rho: Spearman's correlation of the pairs; NaN gives NaN.
        count: n, the number of pairs, at least 2.

    Example:
        >>> [round(end, 2) for rho, count in ((1.0, 5), (0.8, 20)) for end in interval(rho, count)]
        [0.31, 1.0, 0.5, 0.93]
    """
    if math.isnan(rho):
        return math.nan, math.nan
    if count < EXACT_BELOW:
        return _exact(rho, count)
    limit = 1 - 6 / (count**3 - count)
    rho = min(max(rho, -limit), limit)
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def _exact(rho: float, count: int) -> tuple[float, float]:
    values, orders = _distribution(count)

    def probabilities(theta: float) -> np.ndarray:
        logarithms = np.log(orders) + theta * values
        weights = np.exp(logarithms - logarithms.max())
        return np.asarray(weights / weights.sum())

    def end(tail: np.ndarray) -> float:
        theta = brentq(lambda t: probabilities(t)[tail].sum() - TAIL, -2000.0, 2000.0)
        return float(probabilities(theta) @ values)

    low = -1.0 if rho <= -1 + 1e-9 else end(values >= rho - 1e-9)
    high = 1.0 if rho >= 1 - 1e-9 else end(values <= rho + 1e-9)
    return low, high


@cache
def _distribution(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of ρ over all orders of ``count`` ranks, and how many orders have each."""
    ranks = np.arange(count, dtype=np.int32)
    orders = np.array(list(permutations(range(count))), dtype=np.int32)
    products, counts = np.unique(orders @ ranks, return_counts=True)
    return 1 - 12 * (ranks @ ranks - products) / (count**3 - count), counts
