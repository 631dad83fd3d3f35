"""The rule that recommends one of several ways by few scores of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from hyperopt_peft.utils.statistics import error_of

#: How many standard errors an earlier way may be behind the best one. Chosen by
#: benchmarks/sources.py.
WITHIN = 0.5


def recommended(
    scores: Mapping[str, Sequence[float]], lower_is_better: bool, within: float = WITHIN
) -> str:
    """The first way whose mean is at most ``within`` standard errors behind the best mean.

    The error is that of the paired difference to the best. Ways are listed from the simplest one.
    At 0 the best mean decides. Breiman et al. 1984, §3.4.3, have one error.

    Args:
        scores: of each way, by seed.
        lower_is_better: of a score.
        within: the number of errors.

    Example:
        >>> scores = {"simple": [0.30, 0.20], "best": [0.22, 0.22], "third": [0.9, 0.8]}
        >>> recommended(scores, True, within=1), recommended(scores, True, within=0)
        ('simple', 'best')
    """
    sign = 1 if lower_is_better else -1
    best = min(scores, key=lambda name: sign * fmean(scores[name]))
    for name, values in scores.items():
        gaps = behind(values, scores[best])
        if sign * fmean(gaps) <= within * error_of(gaps):
            return name
    return best


def behind(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """The differences of ``one`` to ``other``, for each seed."""
    return [first - second for first, second in zip(one, other, strict=True)]


def sentence(scores: Mapping[str, Sequence[float]], metric: str, lower_is_better: bool) -> str:
    """The recommended way with its mean, the best mean, and their difference with its error.

    Example:
        >>> sentence({"alike": [0.3, 0.4], "trusted": [0.5, 0.5]}, "loss", True)
        'alike is recommended: its mean loss, 0.3500, is the lowest of 2 ways'
    """
    name = recommended(scores, lower_is_better)
    sign, word = (1, "lowest") if lower_is_better else (-1, "highest")
    best = min(scores, key=lambda each: sign * fmean(scores[each]))
    begin = f"{name} is recommended: its mean {metric}, {fmean(scores[name]):.4f}, is "
    if name == best:
        return f"{begin}the {word} of {len(scores)} ways"
    gaps = behind(scores[name], scores[best])
    return (
        f"{begin}{fmean(gaps):+.4f} from the {word}, {fmean(scores[best]):.4f} of {best}, within "
        f"{WITHIN:g} of the standard error {error_of(gaps):.4f}, and it is the simpler one"
    )
