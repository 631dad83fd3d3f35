"""A level over other levels: what the library asks of it, and the answers of a plain level.

`Nested` is the one chain there is. Everything else asks the functions here, so that a `Problem`
knows nothing of chains.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from hyperopt_peft.core.problem import Evaluation, Problem


class Chain(Problem):
    """A level whose loss sees the variables of the levels below where these minimise their own.

    Its ``gradient`` is the total derivative. A subclass says how the levels below are trained and
    how they follow when a level above is displaced.
    """

    @property
    @abstractmethod
    def levels(self) -> tuple[Problem, ...]:
        """This level and those below, from above."""

    @property
    @abstractmethod
    def differences(self) -> int:
        """How many finite differences, one of another, the gradient is made of."""

    @abstractmethod
    def prepare(self) -> None:
        """Train the levels below, before a step of this one."""

    @abstractmethod
    def gradient_of(self, level: Problem, batch: Any, variables: Sequence[Tensor]) -> Evaluation:
        """The total derivative of the loss of ``level``, which is above this one."""

    @abstractmethod
    def anchored(self) -> AbstractContextManager[None]:
        """In the body the levels below follow the displaced variables of the levels above."""


def is_chain(level: Problem) -> bool:
    """Whether ``level`` has levels below."""
    return isinstance(level, Chain)


def levels_of(level: Problem) -> tuple[Problem, ...]:
    """``level`` and the levels below, from above."""
    return level.levels if isinstance(level, Chain) else (level,)


def owned(*levels: Problem) -> tuple[Tensor, ...]:
    """The variables of ``levels`` and of the levels below each."""
    return tuple(v for level in levels for each in levels_of(level) for v in each.variables)


def differences(level: Problem) -> int:
    """How many finite differences, one of another, the gradient of ``level`` is made of."""
    return level.differences if isinstance(level, Chain) else 0


def prepare(level: Problem) -> None:
    """Train the levels below ``level``, if there are any, before a step of it."""
    if isinstance(level, Chain):
        level.prepare()


def gradient_of(
    level: Problem, lower: Problem, batch: Any, variables: Sequence[Tensor]
) -> Evaluation:
    """The loss of ``level`` on ``batch`` and its gradient; total where ``lower`` is a chain."""
    if isinstance(lower, Chain):
        return lower.gradient_of(level, batch, variables)
    return level.gradient(batch, variables)


def anchored(level: Problem) -> AbstractContextManager[None]:
    """In the body the levels below ``level`` follow displaced variables of the levels above."""
    return level.anchored() if isinstance(level, Chain) else nullcontext()
