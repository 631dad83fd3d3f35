"""Φ, the loss on the rows that a user cares about, as the upper level of an attribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError

#: Returns a loss, or its share of one that is computed in parts.
LossPart = Callable[[], Tensor]
#: Φ; or Φ in parts that are summed.
Loss = LossPart | Sequence[LossPart]


class Evaluation(Problem):
    """min over the row weights v of Φ: a batch is the parts of one slice's Φ, which are summed.

    One part's graph is in memory at a time.

    Args:
        weights: the row weights v, ``(n,)``.
        slices: by name, the parts of Φ; or of a single Φ, whose name is ``"all"``.

    Raises:
        ProblemError: there is no slice, or one without parts, or a part is no function.

    Example:
        >>> import torch
        >>> v, w = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
        >>> level = Evaluation(v, lambda: w.square())
        >>> level.gradient(level.slices["all"], (w,)).gradient
        (tensor(2.),)
    """

    def __init__(self, weights: Tensor, slices: Loss | Mapping[str, Loss]) -> None:
        super().__init__([("weights", weights)], name="evaluation")
        named: Mapping[str, Any] = slices if isinstance(slices, Mapping) else {"all": slices}
        self.slices: dict[str, Sequence[LossPart]] = {
            str(name): list(loss) if isinstance(loss, list | tuple) else [loss]
            for name, loss in named.items()
        }
        functions = [function for loss in self.slices.values() for function in loss]
        if not functions or not all(map(callable, functions)):
            raise ProblemError(f"evaluation: give functions that return a loss, got {slices!r}")

    def loss(self, batch: LossPart) -> Tensor:
        """One part of Φ."""
        return batch()

    def terms(self, batch: Sequence[LossPart]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The parts of Φ, one after the other."""
        for function in batch:
            yield from super().terms(function)

    def value(self, name: str) -> float:
        """Φ of the slice ``name`` at the current point."""
        with torch.no_grad():
            return sum(float(function()) for function in self.slices[name])
