"""Gradient accumulation: one objective over several micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.utils.random_state import RandomState, replay


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's batch, and the random states before its loss is evaluated.

    ``weight`` multiplies the loss; the mean of the weights over the micro-batches of a step, on all
    processes, is 1.
    """

    batch: Any
    random_state: RandomState
    weight: float = 1.0


class Accumulated(Problem):
    """A level whose batch is a list of `MicroBatch`; its loss is the mean of ``level``'s losses.

        f(w) = 1/n Σ_i weight_i f_i(w)   over n micro-batches

    Variables and prior are the level's. Every evaluation of a micro-batch has the same random
    numbers, and first-order passes hold one graph at a time. ``optimizer`` may own other tensors
    too.
    """

    def __init__(
        self, level: Problem, optimizer: Any = None, max_grad_norm: float | None = None
    ) -> None:
        self.level = level
        super().__init__(
            list(zip(level.names, level.variables, strict=True)),
            max_grad_norm=max_grad_norm,
            name=level.name,
        )
        self.optimizer, self.prior = optimizer, level.prior
        self.half, self.unread = level.half, level.unread

    @property
    def examples(self) -> Problem | None:
        """As the level's."""
        return self.level.examples

    def terms(self, batch: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The share of each micro-batch in the mean loss, and its metrics."""
        for micro in batch:
            with replay(micro.random_state):
                loss, metrics = self.level.evaluate(micro.batch)
            self.half, self.unread = self.level.half, self.level.unread
            yield loss * (micro.weight / len(batch)), metrics
