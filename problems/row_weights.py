"""A weight for each training row, learned on trusted rows.

    upper: min over u   L(w*(u); trusted rows)
    lower: w*(u) = argmin over adapter and head w   1/N Σ_i v_i(u) ℓ_i(w)

ℓ_i is the loss of row i (of each label where texts are packed), N the number of labels. v is 2σ(u)
or, with mean 1, n·softmax(u): Shen et al. 2025, arXiv:2410.07471; `SEAL` has their estimator. In
Franceschi et al. 2017, arXiv:1703.01785, v is in [0, 1] and has a bounded sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import pad

from hyperopt_peft.method import (
    INDEX,
    Batch,
    Method,
    Model,
    Problem,
    Rows,
    Share,
    TaskLoss,
    WeightedRows,
    option,
    require_examples,
)


@dataclass
class RowWeights(Method):
    """A weight for each training row; then a training from scratch, on the trusted rows too.

    Raises:
        ProblemError: there are no trusted rows, ``upper_dataset``; ``keep`` is no share; the
            trainer's loss is no known mean over labels and no ``row_losses`` are given.

    Example:
        >>> method = RowWeights()
        >>> method.rows(["a", "b"], ["trusted"])
        (['a', 'b'], ['trusted'])
        >>> method.prepare(torch.nn.Linear(1, 1))
        >>> method.row_weights()
        tensor([1., 1.], grad_fn=<MulBackward0>)
    """

    keep: Share | None = option(
        None, help="share of rows, by weight, that train at last; None: all, with their weights"
    )
    form: Literal["sigmoid", "softmax"] = option(
        "sigmoid", help="v of u; softmax moves the weights of all rows in each step"
    )

    tags = (INDEX,)
    one_level = False  # all weights go to 0, or to the row of least loss
    # An upper step after each lower one would take most of the passes.
    defaults = {"hypergradient": "darts:product=dots", "lower_steps": 4, "retrain": "scratch"}

    def rows(self, train: Rows, upper: Rows | None) -> tuple[Any, Any]:
        """Both as they are."""
        require_examples("upper_dataset", upper)
        self.count = len(train)
        return train, upper

    def prepare(self, model: Model) -> None:
        """Begin with equal weights."""
        device = next(model.parameters()).device
        self.logits = torch.zeros(self.count, device=device, requires_grad=True)

    def upper_variables(self, model: Model) -> dict[str, Tensor]:
        """u, a logit a row."""
        return {"logits": self.logits}

    def row_weights(self) -> Tensor:
        """v, ``(n,)``."""
        if self.form == "softmax":
            return self.count * self.logits.softmax(0)
        return 2 * self.logits.sigmoid()

    def weights(self, batch: Batch) -> Tensor:
        """v of each row or label of a batch; 1 for trusted rows."""
        return pad(self.row_weights(), (0, 1), value=1.0)[batch[INDEX].clamp(max=self.count)]

    def lower(self, model: Model, task_loss: TaskLoss) -> Problem:
        """Σ v_i ℓ_i/N, in the second phase of the best rows the loss of the trainer."""
        if self.keep is not None and not self.logits.requires_grad:
            return super().lower(model, task_loss)
        return WeightedRows(model, self.weights, tags=self.tags, row_losses=self.row_losses)

    def finish(self, model: Model) -> Any:
        """``model``; the weights stay as they are."""
        self.logits.requires_grad_(False)
        return model

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The rows of largest weight, in their order, and the trusted rows; before a search all."""
        if self.keep is not None and hasattr(self, "logits"):
            train = self.best_rows(train)
        return super().all_rows(train, upper)

    def best_rows(self, train: Dataset) -> Any:
        """The rows of largest weight, a share ``keep`` of ``train``, in their order."""
        best = self.logits.topk(max(1, round((self.keep or 1) * self.count))).indices
        return train.select(best.sort().values.tolist())
