"""Simple methods for rare classes: adjusted logits, and weights of classes.

    LogitAdjustment     min over w   CE(z + τ·log π; D)
    TunedAdjustment     min over τ   CE(z; D_val), equal weights of classes; w*(τ) as above
    FrequencyWeights    min over w   mean of v_y·CE(z; D),   v_y in proportion to π_y^−power

z are the logits of the model w, π the classes' shares of the training labels. τ = 1 is
Bayes-optimal for balanced accuracy, Menon et al. 2021, arXiv:2007.07314; see also `ClassOffsets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from hyperopt_peft.method import (
    IGNORED,
    WEIGHT,
    Method,
    ProblemError,
    TaskLoss,
    label_counts,
    option,
)
from hyperopt_peft.problems.class_offsets import balanced_loss, class_labels, logits_and_labels


class _Counting(Method):
    loss_of_logits: Callable[[Tensor, Tensor], Tensor]  # and labels

    def lower_loss(self, model: Any, batch: Any, task_loss: TaskLoss) -> Any:
        """`loss_of_logits` of the batch."""
        return self.loss_of_logits(*logits_and_labels(self, model, batch)) * batch.get(WEIGHT, 1.0)

    def read_rows(self, model: Any, rows: Any, collate: Callable[[Sequence[Any]], Any]) -> None:
        """Count the labels of each class."""

        def with_classes(rows: Sequence[Any]) -> Any:
            class_labels(batch := collate(rows))
            return batch

        self.counts = label_counts("labels", 1, None, rows, with_classes)

    def class_counts(self, logits: Tensor) -> Tensor:
        """The number of labels of each class of ``logits``."""
        if not hasattr(self, "counts"):
            raise ProblemError("labels: they are not counted; call read_rows first")
        return pad(self.counts, (0, logits.shape[-1] - len(self.counts))).to(logits)

    def class_shares(self, logits: Tensor) -> Tensor:
        """π of each class of ``logits``; a class without a label counts as half a label."""
        return self.class_counts(logits).clamp(min=0.5) / self.counts.sum()


@dataclass
class LogitAdjustment(_Counting):
    """One level over the adapter with τ·log π added to the logits; the saved model has none.

    Raises:
        ProblemError: ``tau`` is not finite; labels are no classes, or are not counted.

    Example:
        >>> method = LogitAdjustment()
        >>> method.counts = torch.tensor([3, 1])
        >>> method.class_shares(torch.zeros(1, 2))
        tensor([0.7500, 0.2500])
    """

    tau: float = option(1.0, help="τ")

    def loss_of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of z + τ·log π."""
        tau = getattr(self, "learned", self.tau)
        return cross_entropy(logits + tau * self.class_shares(logits).log(), labels)


@dataclass
class TunedAdjustment(LogitAdjustment):
    """τ above, from ``tau``, and all of the adapter below; as `ClassOffsets` with one variable.

    Example:
        >>> method = TunedAdjustment(tau=0.5)
        >>> method.prepare(torch.nn.Linear(1, 1))
        >>> method.upper_variables(None)
        {'tau': tensor(0.5000, requires_grad=True)}
    """

    full_upper_batch = True  # as `ClassOffsets`
    defaults = {"hypergradient": "minres:steps=5,damping=1.0", "lower_steps": 4}

    def prepare(self, model: Any) -> None:
        """Make τ."""
        device = next(model.parameters()).device
        self.learned = torch.tensor(float(self.tau), device=device, requires_grad=True)

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """τ."""
        return {"tau": self.learned}

    def upper_loss(self, model: Any, batch: Any, task_loss: TaskLoss) -> Tensor:
        """The cross entropy of z with equal weights for the classes of the batch."""
        return balanced_loss(self, model, batch)


@dataclass
class FrequencyWeights(_Counting):
    """One level over the adapter with labels weighted by their class; the mean weight is 1.

    Raises:
        ProblemError: ``power`` is not finite; as `LogitAdjustment`.

    Example:
        >>> method = FrequencyWeights()
        >>> method.counts = torch.tensor([3, 1])
        >>> method.weights(torch.zeros(1, 2))
        tensor([0.6667, 2.0000])
    """

    power: float = option(1.0, help="1 gives classes equal weights, 0 gives labels equal weights")

    def weights(self, logits: Tensor) -> Tensor:
        """v of each class of ``logits``."""
        counts, weights = self.class_counts(logits), self.class_shares(logits) ** -self.power
        return weights * counts.sum() / (weights * counts).sum()

    def loss_of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean of v_y·CE over the labels."""
        losses: Tensor = cross_entropy(logits, labels, self.weights(logits), reduction="none")
        return losses.sum() / (labels != IGNORED).sum().clamp(min=1)
