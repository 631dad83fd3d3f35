"""A weight for each training row from its loss, by a small net that is learned on trusted rows.

    upper: min over u   L(w*(u); trusted rows)
    lower: w*(u) = argmin over adapter and head w   1/N Σ_i v_i ℓ_i(w),   v_i = 2σ(V(ℓ_i; u))

ℓ_i is the loss of row i, N the number of labels; with ``row_losses`` of the user's own ℓ_i is n
times the row's part of the batch's loss. Shu et al. 2019 (Meta-Weight-Net),
arXiv:1902.07379, whose code has σ for 2σ and the learning rate for ξ, and leaves ∂v_i/∂w out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.method import (
    IGNORED,
    WEIGHT,
    Batch,
    Method,
    Model,
    Problem,
    ProblemError,
    TaskLoss,
    WeightedRows,
)


@dataclass
class WeightNet(Method):
    """A net of ``hidden`` units from the loss of a row to its weight.

    Example:
        >>> method = WeightNet(hidden=4)
        >>> method.prepare(nn.Linear(1, 1))
        >>> method.row_weights(torch.ones(3)).shape
        torch.Size([3])
    """

    hidden: int = 100

    one_level = False  # all weights go to 0
    defaults = {"hypergradient": "darts:product=dots"}

    def prepare(self, model: Model) -> None:
        """Make the net."""
        layers = nn.Linear(1, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1)
        self.net = nn.Sequential(*layers).to(next(model.parameters()).device)

    def upper_variables(self, model: Model) -> dict[str, Tensor]:
        """The parameters of the net."""
        return dict(self.net.named_parameters())

    def row_weights(self, losses: Tensor) -> Tensor:
        """v of rows with ``losses`` ``(n,)``."""
        like = next(self.net.parameters())
        logits: Tensor = self.net(losses[:, None].to(like))[:, 0]
        return 2 * logits.sigmoid().to(losses)

    def lower(self, model: Model, task_loss: TaskLoss) -> Problem:
        """Σ v_i ℓ_i/N."""
        return _NetWeighted(self, model)


class _NetWeighted(WeightedRows):
    def __init__(self, method: WeightNet, model: Any) -> None:
        self.method = method
        weights = lambda batch: torch.ones(len(batch["labels"]))  # noqa: E731
        super().__init__(model, weights, row_losses=method.row_losses)

    def weighted(self, losses: Tensor, batch: Batch) -> dict[str, Tensor]:
        if "position_ids" in batch:  # of packed or joined rows
            raise ProblemError("WeightNet: a pack has no loss for each row; choose RowWeights")
        count = (batch["labels"] != IGNORED).sum().clamp(min=1)
        share = batch.get(WEIGHT, 1.0) / (count if self.row_losses is None else len(losses))
        weights = self.method.row_weights(losses / share)
        return {"loss": (weights * losses).sum(), "task_loss": losses.detach().sum()}
