"""The errors of this library: each says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class ProblemError(ValueError):
    """A level, a pair of levels or an option that cannot be trained as it is."""


class NonFiniteError(FloatingPointError):
    """A loss, gradient or curvature that is NaN or infinite."""


NON_FINITE_ADVICE = (
    "lower the learning rate or max_grad_norm, or leave such steps out with non_finite='skip'"
)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """How an error about an unknown ``word`` ends: the nearest of the known ones, or all."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names) or 'none'}"
