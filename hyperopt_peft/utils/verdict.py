"""A mean of few numbers, such as paired differences, with its uncertainty and a sentence."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any, Self

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, nct, sem, t

#: A mean of at most this size is 0 up to the rounding of scores in single precision.
ROUNDING = 1e-7
#: The quantiles by which a mean over the sample deviation is taken.
QUANTILES = (np.arange(400) + 0.5) / 400


class Verdict:
    """The mean of ``values``, its 95 % t-interval, and whether it differs from 0.

    With ``influence`` the interval is over test rows, too: values of n seeds on the same rows share
    what is particular to these rows, which their own deviation does not show. Seeds and rows are
    crossed random effects, and the variance of the mean is (MS_seeds + MS_rows − MS_residual)/(nG)
    for n seeds and G parts of the rows, at least that of the seeds, with Satterthwaite's degrees of
    freedom (Searle, Casella and McCulloch 1992, Variance Components, sections 2.2 and 4.3). The
    residual, which both mean squares have, so counts once.

    Args:
        values: differences of scores, say, of n seeds.
        points: show them in points, hundredths with one decimal, not with three significant digits.
        influence: how far each of G parts of the test rows moves each value, of shape (n, G): of a
            mean over rows, the mean of the part minus that of all. Rows sum to 0.

    Attributes:
        estimate: the mean.
        error, half: its standard error, and half the width of the interval; infinite for one value.
        freedom: the degrees of freedom of the t-distribution.
        over_rows: whether the interval is over test rows.
        corrected: the p-value that decides; ``p_value``, unless `holm` has corrected it.
        family: how many verdicts were corrected together.

    Example:
        >>> gains = Verdict([0.01, 0.03, 0.02], points=True)
        >>> str(gains), round(gains.p_value, 3), gains.is_significant
        ('+2.0 ± 2.5', 0.074, False)
        >>> print(gains.sentence("mine", "LoRA", "accuracy", "seeds"))
        no significant difference between mine and LoRA in accuracy (+2.0 ± 2.5 points); minimum \
detectable difference with 3 seeds (80 % power): 5.1 points
    """

    def __init__(self, values: Iterable[float], points: bool = False, influence: Any = None):
        self.values, self.points, self.family = [*values], points, 1
        self.estimate, self.freedom = fmean(self.values), float(len(self.values) - 1)
        self.error = float(sem(self.values)) if self.freedom else math.inf
        self.influence = None if influence is None else np.asarray(influence, dtype=float)
        self.over_rows = bool(influence is not None and self.freedom)
        if self.over_rows:
            self._add_rows(self.influence)
        self.half = float(t.ppf(0.975, self.freedom) * self.error) if self.freedom else math.inf
        self.corrected = self.p_value

    @classmethod
    def crossed(cls, scores: Any, points: bool = False) -> Self:
        """By scores of shape (seeds, rows), whose mean over rows is the value of a seed.

        Example:
            >>> easy, hard = [0.3, 0.1], [0.2, 0.2]  # of two rows, by two seeds
            >>> [round(x.half, 2) for x in (Verdict([0.2, 0.2]), Verdict.crossed([easy, hard]))]
            [0.0, 0.0]
        """
        table = np.asarray(scores, dtype=float)
        means = table.mean(axis=1)
        return cls(means.tolist(), points, table - means[:, None])

    def _add_rows(self, influence: Any) -> None:
        """Add the variance of the mean that the rows, shared by all seeds, have."""
        seeds, parts = influence.shape
        shared = influence.mean(axis=0)
        of_seeds = self.error**2
        of_rows = float((shared**2).sum() / (parts - 1)) / parts
        freedom = (seeds - 1) * (parts - 1)
        residual = float(((influence - shared) ** 2).sum() / freedom) / (seeds * parts)
        if of_rows <= residual:
            return
        variance = of_seeds + of_rows - residual
        squares = of_seeds**2 / (seeds - 1) + of_rows**2 / (parts - 1) + residual**2 / freedom
        self.error = math.sqrt(variance)
        self.freedom = max(variance**2 / squares, min(seeds, parts) - 1.0)

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval."""
        return self.estimate - self.half, self.estimate + self.half

    @property
    def p_value(self) -> float:
        """Of the two-sided, for differences paired t-test; 1 if the mean is a rounding of 0."""
        if abs(self.estimate) <= ROUNDING or not self.freedom:
            return 1.0
        ratio = abs(self.estimate) / self.error if self.error else math.inf
        return float(2 * t.sf(ratio, self.freedom))

    @property
    def is_significant(self) -> bool:
        """Whether the mean differs from 0 at the 5 % level, corrected for the family."""
        return self.corrected < 0.05

    @property
    def detectable(self) -> float:
        """The minimum detectable difference: a true mean that as many new values find in 80 %.

        The error is itself an estimate, too small as often as too large: the difference is so large
        that the mean over these errors is 80 %. In a family of m it is at the level 5 %/m, so that
        Holm's correction finds it at least as often.
        """
        if not self.freedom or not self.error:
            return self.error
        return _detectable(self.freedom, self.family) * self.error

    def shown(self, sign: str = "") -> str:
        """The mean ± half the interval, where there is one."""
        text = self._number(self.estimate, sign)
        return f"{text} ± {self._number(self.half)}" if self.freedom else text

    def __str__(self) -> str:
        return self.shown("+")

    def _number(self, value: float, sign: str = "") -> str:
        """``value``, with as many decimals as the mean and its interval."""
        largest = max(abs(self.estimate), self.half if self.freedom else 0.0)
        scale, digits = (100, 1) if self.points else (1, 3)
        if not self.points and ROUNDING < largest < math.inf:
            digits = max(2 - math.floor(math.log10(largest)), 0)
        return f"{scale * value:{sign}z.{digits}f}".replace("-", "−")

    def sentence(
        self, one: str, other: str, metric: str, unit: str, lower_is_better: bool = False
    ) -> str:
        """In words, for differences of ``metric``, that of ``one`` minus that of ``other``."""
        points = " points" if self.points else ""
        if self.is_significant:
            word = "better" if (self.estimate < 0) == lower_is_better else "worse"
            by = f"{self._number(abs(self.estimate))} ± {self._number(self.half)}{points}"
            return f"{one} is {word} than {other} in {metric} by {by}"
        alone = f"; p = {self.p_value:.2g}, by Holm's correction {self.corrected:.2g}"
        text = f"no significant difference between {one} and {other} in {metric} "
        text += f"({self}{points}{alone * (self.p_value < 0.05)})"
        if self.error:
            text += f"; minimum detectable difference with {len(self.values)} {unit} (80 % power): "
            text += f"{self._number(self.detectable)}{points}"
        return text


@functools.cache
def _detectable(freedom: float, family: int) -> float:
    """The mean, in units of its estimated error, that a t-test finds with probability 0.8."""
    limit = t.ppf(1 - 0.025 / family, freedom)
    errors = np.sqrt(chi2.ppf(QUANTILES, freedom) / freedom)  # estimated ones, by the true one
    missed = lambda size: float(nct.cdf(limit, freedom, size * errors).mean()) - 0.2  # noqa: E731
    largest = 4 * limit
    while missed(largest) > 0:
        largest *= 2
    return float(brentq(missed, 0, largest, rtol=1e-4))


def holm(p_values: Iterable[float]) -> list[float]:
    """The p-values of a family, so corrected that at most 5 % of families have a false finding.

    The k-th smallest of m is multiplied by m − k + 1, and is at least the one before (Holm 1979,
    A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [*p_values], 0.0
    for rank, place in enumerate(sorted(range(len(corrected)), key=corrected.__getitem__)):
        largest = max(largest, min(1.0, (len(corrected) - rank) * corrected[place]))
        corrected[place] = largest
    return corrected
