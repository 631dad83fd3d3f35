"""The interface of a level that has levels below it, and the defaults for a level that has none.

`Nested` is the only subclass. Drivers and estimators call the functions of this module, which
accept every `Problem`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from hyperopt_peft.core.problem import Evaluation, Problem


class Chain(Problem):
    """A level whose loss is a function of the minimum of the level below.

    G̃(u, v) = G(u, v, w*(u, v)) with w* the minimum of the level below; ``gradient`` is the total
    derivative of G̃. A subclass defines how the levels below are trained, and how w follows w*
    when u or v is perturbed.
    """

    @property
    @abstractmethod
    def levels(self) -> tuple[Problem, ...]:
        """This level, then the levels below, from top to bottom."""

    @property
    @abstractmethod
    def differences(self) -> int:
        """The depth of finite differences in ``gradient``: 2 for a difference of differences."""

    @abstractmethod
    def prepare(self) -> None:
        """Train the levels below, before a step of this level."""

    @abstractmethod
    def gradient_of(self, level: Problem, batch: Any, variables: Sequence[Tensor]) -> Evaluation:
        """The loss on ``batch`` of ``level``, a level above, and its total derivative."""

    @abstractmethod
    def anchored(self) -> AbstractContextManager[None]:
        """Within the body, the levels below follow perturbed variables of the levels above."""


def is_chain(level: Problem) -> bool:
    """Whether ``level`` has levels below."""
    return isinstance(level, Chain)


def levels_of(level: Problem) -> tuple[Problem, ...]:
    """``level``, then the levels below, from top to bottom."""
    return level.levels if isinstance(level, Chain) else (level,)


def owned(*levels: Problem) -> tuple[Tensor, ...]:
    """The variables of ``levels`` and of all levels below these."""
    return tuple(v for level in levels for each in levels_of(level) for v in each.variables)


def differences(level: Problem) -> int:
    """The depth of finite differences in the gradient of ``level``; 0 without levels below."""
    return level.differences if isinstance(level, Chain) else 0


def prepare(level: Problem) -> None:
    """Train the levels below ``level``, if there are any, before a step of ``level``."""
    if isinstance(level, Chain):
        level.prepare()


def gradient_of(
    level: Problem, lower: Problem, batch: Any, variables: Sequence[Tensor]
) -> Evaluation:
    """The loss of ``level`` on ``batch`` and its gradient.

    The gradient is a total derivative where ``lower``, the level below ``level``, is a chain.
    """
    if isinstance(lower, Chain):
        return lower.gradient_of(level, batch, variables)
    return level.gradient(batch, variables)


def anchored(level: Problem) -> AbstractContextManager[None]:
    """Within the body, the levels below ``level`` follow perturbed variables of levels above."""
    return level.anchored() if isinstance(level, Chain) else nullcontext()
