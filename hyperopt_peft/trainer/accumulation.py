"""Gradient accumulation: one objective over several micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay

#: Entries of a batch that `BilevelTrainer.task_loss` reads and removes.
ITEMS, WEIGHT = "num_items_in_batch", "loss_weight"


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's batch, and the random states before its loss is evaluated.

    ``weight`` multiplies the part's loss; the mean of the weights over the parts of a batch, on all
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

    Example:
        >>> w = torch.ones((), requires_grad=True)
        >>> class Scale(Problem):
        ...     def loss(self, batch):
        ...         return w * batch
        >>> start = RandomState.capture()
        >>> batch = [MicroBatch(torch.tensor(x), start) for x in (1.0, 3.0)]
        >>> Accumulated(Scale([w])).gradient(batch, (w,)).gradient
        (tensor(2.),)
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

    def terms(self, batch: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The share of each micro-batch in the mean loss, and its metrics."""
        for micro in batch:
            with replay(micro.random_state):
                loss, metrics = self.level.evaluate(micro.batch)
            self.half, self.unread = self.level.half, self.level.unread
            yield loss * (micro.weight / len(batch)), metrics


def label_weights(
    batches: Sequence[Any], *, shifted: bool, items: bool, across_processes: bool
) -> list[dict[str, Tensor]]:
    """The entries of each batch that make a step's loss the mean over all of its labels.

    The loss of micro-batch i on process p is the mean over its c_ip labels that are not -100. The
    loss of a step of n micro-batches on P processes is

        1/(nP) Σ_ip weight_ip · loss_ip,   weight_ip = c_ip · nP / Σ c

    Args:
        batches: the n micro-batches of this process; without ``labels`` there are no entries.
        shifted: whether a label is the next token's, so that the first one of a row is not scored.
        items: whether the loss takes ``num_items_in_batch``, c_ip.
        across_processes: whether the Trainer multiplies such a loss by P, which c_ip·P undoes.
    """
    counts = [scored_labels(batch, shifted) for batch in batches]
    known = [count for count in counts if count is not None]
    if not known or len(known) < len(batches):
        return [{} for _ in batches]
    # Apple's devices have no floats of 64 bits.
    exact = torch.float32 if known[0].is_mps else torch.float64
    mean = distributed.average(torch.stack(known).sum().to(exact)) / len(known)
    factor = distributed.world_size() if across_processes else 1
    return [
        {WEIGHT: count / mean, **({ITEMS: count.clamp(min=1) * factor} if items else {})}
        for count in known
    ]


def scored_labels(batch: Any, shifted: bool) -> Tensor | None:
    """The number of labels of ``batch`` that are scored; None without labels."""
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        if shifted and isinstance(labels, Tensor):
            labels = labels[..., 1:]
    return labels.ne(-100).sum() if isinstance(labels, Tensor) else None
