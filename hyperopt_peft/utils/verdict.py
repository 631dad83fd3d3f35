"""A mean of few numbers, such as paired differences, with its uncertainty and a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean

from scipy.optimize import brentq
from scipy.stats import nct, sem, t

#: A mean of at most this size is 0 up to the rounding of scores in single precision.
ROUNDING = 1e-7


class Verdict:
    """The mean of ``values``, its 95 % t-interval, and whether it differs from 0.

    Args:
        values: differences of scores, say.
        points: show them in points, hundredths with one decimal, not with three significant digits.

    Attributes:
        estimate: the mean.
        error, half: its standard error, and half the width of the interval; infinite for one value.
        corrected: the p-value that decides; ``p_value``, unless `holm` has corrected it.
        family: how many verdicts were corrected together.

    Example:
        >>> gains = Verdict([0.01, 0.03, 0.02], points=True)
        >>> str(gains), round(gains.p_value, 3), gains.is_significant
        ('+2.0 ± 2.5', 0.074, False)
        >>> print(gains.sentence("mine", "LoRA", "accuracy", "seeds"))
        no significant difference between mine and LoRA in accuracy (+2.0 ± 2.5 points); minimum \
detectable difference with 3 seeds (80 % power): 3.3 points
    """

    def __init__(self, values: Iterable[float], points: bool = False) -> None:
        self.values, self.points, self.family = [*values], points, 1
        self.estimate, self.freedom = fmean(self.values), len(self.values) - 1
        self.error = float(sem(self.values)) if self.freedom else math.inf
        self.half = float(t.ppf(0.975, self.freedom) * self.error) if self.freedom else math.inf
        self.corrected = self.p_value

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
        """The minimum detectable difference: a true mean of it is found with probability 0.8.

        By the noncentral t-distribution with the deviation of the values. In a family of m it is at
        the level 5 %/m, so that Holm's correction finds it at least as often.
        """
        if not self.freedom or not self.error:
            return self.error
        limit = t.ppf(1 - 0.025 / self.family, self.freedom)
        missed = lambda shift: nct.cdf(limit, self.freedom, shift) - 0.2  # noqa: E731
        return float(brentq(missed, 0, 4 * limit) * self.error)

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
