"""A weight for each training row, learned on trusted rows.

    upper: min over u   L(w*(u); trusted rows)
    lower: w*(u) = argmin over adapter and head w   1/N Σ_i v_i(u) ℓ_i(w)

ℓ_i is the loss of row i, or of a label of it where texts are packed, N the number of labels.
`RowWeights`: v_i = 2σ(u_i). Franceschi et al. 2017, arXiv:1703.01785 §5.1; Shen et al. 2025 (SEAL),
arXiv:2410.07471. `WeightNet`: v_i = 2σ(V(ℓ_i; u)), V a small net. Shu et al. 2019
(Meta-Weight-Net), arXiv:1902.07379, who leave ∂v_i/∂w out.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import WEIGHT
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.core.problem import Problem, TaskLoss
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import joined, require_examples
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.tags import INDEX


@dataclass
class RowWeights(Method):
    """A weight for each training row; the second phase trains on the best rows and the trusted.

    Args:
        keep: the share of rows that the second phase keeps, those of largest weight, with equal
            weights; None for all rows with the weights that were learned.

    Raises:
        ProblemError: there are no trusted rows, ``upper_dataset``; ``keep`` is no share; the
            trainer's loss is no mean over labels.

    Example:
        >>> method = RowWeights()
        >>> method.rows(["a", "b"], ["trusted"])
        (['a', 'b'], ['trusted'])
        >>> method.prepare(nn.Linear(1, 1))
        >>> method.row_weights()
        tensor([1., 1.], grad_fn=<MulBackward0>)
    """

    keep: float | None = 0.8

    tags = (INDEX,)
    defaults = MappingProxyType({"hypergradient": "darts:product=dots"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ProblemError(f"keep: must be a share in (0, 1], or None, got {self.keep}")

    def rows(self, train: Any, upper: Any) -> tuple[Any, Any]:
        """The given ones."""
        require_examples("upper_dataset", upper)
        self.count = len(train)
        return train, upper

    def prepare(self, model: Any) -> None:
        """Begin with equal weights."""
        device = next(model.parameters()).device
        self.logits = torch.zeros(self.count, device=device, requires_grad=True)

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """u, a logit a row."""
        return {"logits": self.logits}

    def row_weights(self) -> Tensor:
        """v, ``(n,)``."""
        return 2 * self.logits.sigmoid()

    def weights(self, batch: Any) -> Tensor:
        """v of each row or label of a batch; 1 for trusted rows."""
        return pad(self.row_weights(), (0, 1), value=1.0)[batch[INDEX].clamp(max=self.count)]

    def lower(self, model: Any, task_loss: TaskLoss) -> Problem:
        """Σ v_i ℓ_i/N, in the second phase of the best rows the loss of the trainer."""
        if self.keep is not None and not self.logits.requires_grad:
            return super().lower(model, task_loss)
        return WeightedRows(model, self.weights, tags=self.tags)

    def finish(self, model: Any) -> Any:
        """``model``; the weights stay as they are."""
        self.logits.requires_grad_(False)
        return model

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The rows of largest weight, in their order, and the trusted rows; before a search all."""
        if self.keep is not None and hasattr(self, "logits"):
            best = self.logits.topk(max(1, round(self.keep * self.count))).indices
            train = train.select(best.sort().values.tolist())
        return joined(train_dataset=train, upper_dataset=upper)


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

    defaults = MappingProxyType({"hypergradient": "darts:product=dots"})

    def prepare(self, model: Any) -> None:
        """Make the net."""
        layers = nn.Linear(1, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1)
        self.net = nn.Sequential(*layers).to(next(model.parameters()).device)

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """The parameters of the net."""
        return dict(self.net.named_parameters())

    def row_weights(self, losses: Tensor) -> Tensor:
        """v of rows with ``losses`` ``(n,)``."""
        like = next(self.net.parameters())
        logits: Tensor = self.net(losses[:, None].to(like))[:, 0]
        return 2 * logits.sigmoid().to(losses)

    def lower(self, model: Any, task_loss: TaskLoss) -> Problem:
        """Σ v_i ℓ_i/N."""
        return _NetWeighted(self, model)


class _NetWeighted(WeightedRows):
    def __init__(self, method: WeightNet, model: Any) -> None:
        self.method = method
        super().__init__(model, lambda batch: torch.ones(len(batch["labels"])))

    def weighted(self, losses: Tensor, batch: Any) -> dict[str, Tensor]:
        if "position_ids" in batch:  # of packed or joined rows
            raise ProblemError("WeightNet: a pack has no loss for each row; choose RowWeights")
        share = batch.get(WEIGHT, 1.0) / (batch["labels"] != IGNORED).sum().clamp(min=1)
        weights = self.method.row_weights(losses / share)
        return {"loss": (weights * losses).sum(), "task_loss": losses.detach().sum()}
