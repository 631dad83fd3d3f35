"""Lower steps along f + share·F, for an estimator that owns the updates of both levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import unchanged


def with_upper_share(
    gradient: Sequence[Tensor | None],
    share: float,
    upper: Problem,
    lower: Problem,
    batch: Any,
    random_state: RandomState,
) -> tuple[Tensor | None, ...]:
    """∂/∂w (f + share·F) from ∂f/∂w, by one forward+backward of F.

    Args:
        gradient: ∂f/∂w, a part for each variable of ``lower``; it is not changed.
        share: the weight of F.
        upper: the level with loss F.
        lower: the level that owns w.
        batch: what F is given.
        random_state: where F's random numbers come from.

    Buffers and random states are afterwards as before: F leaves nothing but its gradient.

    Raises:
        NonFiniteError: F or its gradient is NaN or infinite.
    """
    w = lower.variables
    with unchanged((*upper.variables, *w), devices_of(upper, lower)), replay(random_state):
        above = lower.gradient_of(upper, batch, w).gradient
    return tuple(
        f if of_upper is None else share * of_upper if f is None else f.add(of_upper, alpha=share)
        for f, of_upper in zip(gradient, above, strict=True)
    )
