"""SEAL: chooses the training rows that agree with trusted rows, as its published code does.

    bilevel: min over ω   L(w*(ω); trusted rows),   w*(ω) = argmin over w   1/n Σ_i σ_i ℓ_i(w)
    w:       a step on    c·L(w; trusted rows) + (1 − c)·1/n Σ_i σ_i ℓ_i(w)
    ω:       a step on    1/n Σ_i σ_i(ω) ℓ_i(w),   σ = n·softmax(ω)

ω is a logit for each of n training rows; where rows have several labels, means are over labels. The
steps are a penalty method without the value function's term, and so **both descend one loss**, that
of w: at fixed w its minimum over ω is the row of least ℓ_i. With c near 1 the weights rank the rows
by their loss under a model of the trusted rows, an ablation of one line. Shen et al. 2025,
arXiv:2410.07471; github:hanshen95/SEAL, where c falls over the epochs from 1 to 0.94 (`Method` has
no hook for it). `RowWeights` is the bilevel problem itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from hyperopt_peft.method import (
    INDEX,
    Batch,
    Bound,
    Collate,
    Model,
    Problem,
    Rows,
    Share,
    TaskLoss,
    WeightedRows,
    joined,
    label_counts,
    option,
)
from hyperopt_peft.problems.row_weights import RowWeights


@dataclass
class SEAL(RowWeights):
    """Logits of rows above, adapter and head below; then a training on the best rows alone.

    The second phase is from scratch by default, as published.

    The upper level's batches are of training rows, and the lower level's of all rows. A lower
    batch without a trusted row has no first term.

    Raises:
        ProblemError: ``trust`` is outside of [0, 1]; as `RowWeights`.

    Example:
        >>> from datasets import Dataset
        >>> method = SEAL(trust=0.97)
        >>> train, trusted = Dataset.from_dict({"index": [0, 1]}), Dataset.from_dict({"index": [2]})
        >>> [rows["index"][:] for rows in method.rows(train, trusted)]
        [[0, 1, 2], [0, 1]]
        >>> method.prepare(torch.nn.Linear(1, 1))
        >>> method.lower_weights({"index": torch.arange(3)})
        tensor([0.0450, 0.0450, 2.9100], grad_fn=...)
    """

    keep: Share | None = option(0.8, help="the share of rows, by weight, that trains at last")
    form: Literal["sigmoid", "softmax"] = option("softmax", help="v of u; see `RowWeights`")
    trust: Annotated[float, Bound("≥", 0), Bound("≤", 1)] = option(0.97, help="c, from 0 to 1")

    # The estimator is part of the method.
    defaults = {"hypergradient": "direct", "lower_steps": 1, "retrain": "scratch"}

    def rows(self, train: Rows, upper: Any) -> tuple[Any, Any]:
        """All rows for the lower level, the training rows for the upper one."""
        super().rows(train, upper)
        # Until `read_rows` counts them, each row has one label.
        self.labels, self.counted = (len(train), len(upper)), False
        return joined(train_dataset=train, upper_dataset=upper), train

    def read_rows(self, model: Model, rows: Dataset, collate: Collate) -> None:
        """Count the labels of the training and of the trusted rows, before the search."""
        if not self.counted:
            counts = label_counts(INDEX, sum(self.labels), model, rows, collate)
            n, m = (int(part.sum()) for part in counts.tensor_split([self.count]))
            self.labels, self.counted = (n, m), True

    def lower_weights(self, batch: Batch) -> Tensor:
        """The weight of each row of a batch of all rows; c·N/M of a trusted one.

        N is the number of all labels, M the number of labels of trusted rows.
        """
        n, m = (max(count, 1) for count in self.labels)
        trusted = (batch[INDEX] >= self.count).to(self.logits)
        weights = (1 - self.trust) * (n + m) / n * self.weights(batch)
        return weights.lerp(torch.full_like(weights, self.trust * (n + m) / m), trusted)

    def lower(self, model: Model, task_loss: TaskLoss) -> Problem:
        """c·L + (1 − c)·1/n Σ σ_i ℓ_i; in the second phase as `RowWeights`."""
        if not self.logits.requires_grad:
            return super().lower(model, task_loss)
        return WeightedRows(model, self.lower_weights, tags=self.tags, row_losses=self.row_losses)

    def upper(self, model: Model, task_loss: TaskLoss) -> Problem:
        """1/n Σ σ_i ℓ_i over ω."""
        own = self.upper_variables(model)
        return WeightedRows(model, self.weights, own, tags=self.tags, row_losses=self.row_losses)

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The training rows of largest weight, or all; before a search the lower level's rows."""
        if not hasattr(self, "logits"):
            return train
        return upper if self.keep is None else self.best_rows(upper)
