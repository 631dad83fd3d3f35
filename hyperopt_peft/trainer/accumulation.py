"""One objective over several micro-batches, as gradient accumulation has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.utils.distributed import means
from hyperopt_peft.utils.random_state import RandomState, replay


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's batch, and the random state its loss was evaluated from."""

    batch: Any
    random_state: RandomState


class Accumulated(Problem):
    """A level whose batch is a list of `MicroBatch`; its loss is the mean of ``level``'s losses.

    It shares the variables of ``level``. Each micro-batch sees its own random numbers again at
    every evaluation, and first-order passes hold one micro-batch in memory at a time.
    ``optimizer`` moves these variables, and may move others.
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
        self.optimizer = optimizer

    def evaluate(self, batch: Sequence[MicroBatch]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss with the graphs of all micro-batches, and the mean metrics."""
        losses, metrics = [], []
        for micro in batch:
            with replay(micro.random_state):
                loss, values = self.level.evaluate(micro.batch)
            losses.append(loss)
            metrics.append(values)
        self.half = self.level.half
        return torch.stack(losses).mean(), means(metrics)

    def backward(
        self, batch: Sequence[MicroBatch], variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        """The means of the micro-batches' losses, metrics and gradients, on this process."""
        losses, metrics = [], []
        total: list[Tensor | None] = [None] * len(variables)
        for micro in batch:
            with replay(micro.random_state):
                loss, values, gradient = self.level.backward(micro.batch, variables)
            losses.append(loss)
            metrics.append(values)
            for index, part in enumerate(gradient):
                if part is not None:
                    known = total[index]
                    share = part / len(batch)
                    total[index] = share if known is None else known.add_(share)
        self.half = self.level.half
        return torch.stack(losses).mean(), means(metrics), tuple(total)
