"""What choosing costs: the score of the best of n settings against the passes of all n runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, isfinite
from statistics import fmean

from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.errors import ProblemError


def best_of(plan: Plan, store: Store, methods: Sequence[str]) -> list[tuple[float, list[float]]]:
    """The expected score of the best of n settings, for each n from 1 to their number.

    A setting is a rate of a method; several ``methods``, such as one for each value of τ, are one
    search. The development runs are read: one held-out part of a seed's rows chooses, and the
    others score, since the part that chooses flatters the chosen. The expectation is over all
    subsets of n settings (Dodge et al. 2019, arXiv:1909.03004, section 3.1, without replacement).

    Returns:
        For each n the passes of n runs, and the expected score of each seed.

    Raises:
        ProblemError: one held-out part alone, or one rate.
    """
    if plan.choice.splits < 2 or len(methods) * len(plan.choice.rates) < 2:
        raise ProblemError("choice: needs two settings, and two splits: one chooses, one scores")
    curves, passes = list[list[float]](), list[float]()
    for seed in plan.seeds:
        runs = [run for name in methods for run in plan.at_rates(name, seed)]
        scores = [[x[-1] for x in plan.by_split(store, run)] for run in runs]
        passes += [plan.spent(store, run) for run in runs]
        sign = -1 if plan.lower_is_better else 1
        of_splits = [
            expected(
                [sign * each[k] for each in scores],
                [fmean(x for j, x in enumerate(each) if j != k) for each in scores],
            )
            for k in range(plan.choice.splits)
        ]
        curves.append([*map(fmean, zip(*of_splits, strict=True))])
    return [
        (n * fmean(passes), [each[n - 1] for each in curves]) for n in range(1, len(curves[0]) + 1)
    ]


def expected(chosen_by: Sequence[float], scores: Sequence[float]) -> list[float]:
    """The expected score of the best of n random settings by ``chosen_by``, for each n.

    The setting of rank r, from 0, is the best of C(r, n − 1) of the C(m, n) subsets. A setting
    without a finite value is never the best.

    Example:
        >>> expected([0.5, 0.7, 0.6], [0.4, 0.8, 0.6])
        [0.6, 0.7333333333333333, 0.8]
    """
    known = [k for k, value in enumerate(chosen_by) if isfinite(value) and isfinite(scores[k])]
    ranked, m = sorted(known, key=chosen_by.__getitem__), len(known)
    return [
        sum(comb(rank, n - 1) / comb(m, n) * scores[k] for rank, k in enumerate(ranked))
        for n in range(1, m + 1)
    ]
