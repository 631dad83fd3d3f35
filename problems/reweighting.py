"""Label noise: a weight for each training example, learned on examples with clean labels.

    upper: min over u   L(w*(u); clean)      `HeldOut`
    lower: w*(u) = argmin over adapter and head w   mean_i v_i ℓ_i(w; noisy)

`SampleWeights`: v_i = σ(u_i), with a logit for each example. Franceschi et al. 2017,
arXiv:1703.01785 §5.1.
`WeightNet`: v_i = V(ℓ_i; u), with a small net V. Meta-Weight-Net, Shu et al. 2019,
arXiv:1902.07379.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.core.examples import WeightedExamples
from hyperopt_peft.core.labels import require_labels
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.problems.example_weights import column, example_losses


class SampleWeights(nn.Module):
    """v_i = σ(u_i), a weight for each of ``count`` training examples; initially u = 0.

    The column ``index`` of a batch has the number of each example, from 0.

    Example:
        >>> weights = SampleWeights(5)
        >>> weights(torch.ones(2), {"index": torch.tensor([3, 4])}).tolist()
        [0.5, 0.5]
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Tensor, batch: Any) -> Tensor:
        """The weights ``(n,)`` of the examples in the batch; ``losses`` is not used."""
        index = column(batch, "index", len(self.logits), "training example")
        return self.logits[index].sigmoid()


class WeightNet(nn.Module):
    """v_i = V(ℓ_i; u), with a net V of one hidden layer and a sigmoid.

    Args:
        hidden: the number of hidden units.
        detach: whether ∂v_i/∂w is omitted from the lower gradient, as in the published algorithm.
            The lower gradient is then the gradient of no function. Finite differences of losses
            would include the omitted term; use an estimator with exact products, such as
            ``"darts:product=exact"``.

    Example:
        >>> WeightNet(hidden=4)(torch.ones(3), batch={}).shape
        torch.Size([3])
    """

    def __init__(self, hidden: int = 100, *, detach: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.detach = detach

    def forward(self, losses: Tensor, batch: Any) -> Tensor:
        """The weights ``(n,)`` of examples with ``losses`` ``(n,)``; ``batch`` is not used."""
        seen = losses.detach() if self.detach else losses
        weights: Tensor = self.net(seen[:, None]).sigmoid()[:, 0]
        return weights


class Weighted(WeightedExamples, Adapter):
    """Lower level: min over the trainable parameters w of mean v_i ℓ_i(w), noisy labels.

    Args:
        model: a Transformers model with an adapter, for classification or language modelling.
        weights: `SampleWeights`, `WeightNet`, or a module (losses ``(n,)``, batch) ↦ v ``(n,)``.
        level: as in `TaskLevel`.

    Raises:
        ProblemError: no parameter of the model is trainable; or as `Problem`. From ``loss``: the
            weights are not of the shape of the losses; or as `row_losses`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> lower = Weighted(model, WeightNet())
        >>> ids = torch.ones(2, 4, dtype=torch.int64)
        >>> sorted(lower.loss({"input_ids": ids, "labels": torch.tensor([0, 1])}))
        ['loss', 'task_loss', 'weight']
    """

    def __init__(self, model: Any, weights: nn.Module, **level: Any) -> None:
        self.weights = weights
        super().__init__(model, **level)

    def groups(self, batch: Any) -> Tensor:
        """Each row is a group."""
        labels = require_labels(batch)
        return torch.arange(len(labels), device=labels.device)

    def losses(self, batch: Any) -> Tensor:
        """ℓ_i, the loss of each row."""
        return example_losses(self.model, batch)

    def weighted(self, losses: Tensor, batch: Any) -> dict[str, Tensor]:
        """Mean v_i ℓ_i; ``weight`` (mean v_i) and ``task_loss`` (mean ℓ_i) are metrics."""
        weights = self.weights(losses, batch)
        if weights.shape != losses.shape:
            raise ProblemError(
                f"{type(self.weights).__name__}: must return a weight for each of "
                f"{len(losses)} examples, got a shape of {tuple(weights.shape)}"
            )
        return {
            "loss": (weights * losses).mean(),
            "weight": weights.mean(),
            "task_loss": losses.mean(),
        }
