"""The errors of this library. Each message names the thing, what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class ProblemError(ValueError):
    """A level, a pair of levels or an option is invalid.

    Example:
        >>> from hyperopt_peft import Problem
        >>> Problem([])
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: Problem: the level has no variables; ...
    """


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a curvature is NaN or infinite, or a training has diverged.

    Example:
        >>> from hyperopt_peft import Engine
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes(log_penalty=1000.0)  # exp(1000) is infinite
        >>> Engine(upper, lower, progress=False).run(1)
        Traceback (most recent call last):
        hyperopt_peft.errors.NonFiniteError: lower step 1: Ridge: ...
    """


class HypergradientWarning(UserWarning):
    """The implicit term of a hypergradient is inaccurate, or missing although F needs it."""


NON_FINITE_ADVICE = (
    "lower the learning rate or max_grad_norm, or skip such steps with non_finite='skip'"
)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown ``word``: the most similar known word, or all words.

    Example:
        >>> did_you_mean("minre", ["cg", "minres"])
        "; did you mean 'minres'?"
        >>> did_you_mean("adam", ["cg", "minres"])
        '; known are cg, minres'
    """
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names) or 'none'}"
