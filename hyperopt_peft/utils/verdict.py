"""A mean of few numbers, such as paired differences, with its uncertainty and a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean

from scipy.stats import sem, t


class Verdict:
    """The mean of ``values``, its 95 % t-interval, and whether it differs from 0.

    Attributes:
        estimate: the mean.
        error: its standard error; infinite for one value.
        half: half the width of the interval; infinite for one value.

    Example:
        >>> gains = Verdict([0.01, 0.03, 0.02])
        >>> str(gains), gains.interval[0] < 0, gains.is_significant
        ('+0.0200 ± 0.0248', True, False)
        >>> print(gains.sentence("mine", "LoRA", "accuracy", "seeds"))
        no significant difference between mine and LoRA in accuracy (+0.0200 ± 0.0248); 3 seeds \
show differences from 0.0310 on
    """

    def __init__(self, values: Iterable[float]) -> None:
        self.values = [*values]
        self.estimate, self.freedom = fmean(self.values), len(self.values) - 1
        self.error = float(sem(self.values)) if self.freedom else math.inf
        self.half = float(t.ppf(0.975, self.freedom) * self.error) if self.freedom else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval."""
        return self.estimate - self.half, self.estimate + self.half

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0; values that are equal up to rounding show nothing."""
        return abs(self.estimate) > self.half >= 1e-9

    @property
    def detectable(self) -> float:
        """The smallest true mean that so many values show with probability 0.8.

        It is (t_0.975 + t_0.8)·s/√n, s the standard deviation of the values.
        """
        if not self.freedom:
            return math.inf
        return float((t.ppf(0.975, self.freedom) + t.ppf(0.8, self.freedom)) * self.error)

    def shown(self, sign: str = "", digits: int = 4) -> str:
        """The mean ± half the interval, where there is one."""
        text = f"{self.estimate:{sign}.{digits}f}".replace("-", "−")
        return f"{text} ± {self.half:.{digits}f}" if self.freedom else text

    def __str__(self) -> str:
        return self.shown("+")

    def sentence(
        self, one: str, other: str, metric: str, unit: str, lower_is_better: bool = False
    ) -> str:
        """In words, for differences of ``metric``, that of ``one`` minus that of ``other``."""
        if self.is_significant:
            word = "better" if (self.estimate < 0) == lower_is_better else "worse"
            by = f"{abs(self.estimate):.4f} ± {self.half:.4f}"
            return f"{one} is {word} than {other} in {metric} by {by}"
        return (
            f"no significant difference between {one} and {other} in {metric} ({self}); "
            f"{len(self.values)} {unit} show differences from {self.detectable:.4f} on"
        )
