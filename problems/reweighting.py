"""Label noise: a weight for each training example, learnt on examples with clean labels.

    upper: min over u   L(w*(u); clean)
    lower: w*(u) = argmin over adapter and head w   mean_i v_i ℓ_i(w; noisy)

where v_i = σ(u_i), a logit an example (`SampleWeights`: Franceschi et al. 2017, arXiv:1703.01785
§5.1), or v_i = V(ℓ_i; u), a small net's judgement of the example's loss (`WeightNet`:
Meta-Weight-Net, Shu et al. 2019, arXiv:1902.07379).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.problems.example_weights import HeldOut, column, example_losses


class SampleWeights(nn.Module):
    """v_i = σ(u_i): a weight for each of ``count`` training examples, all 1/2 at first.

    Batches say in the column ``index`` which examples they hold, numbers from 0.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ProblemError(f"there must be at least one training example, got {count}")
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Tensor, batch: Any) -> Tensor:
        """The weights ``(n,)`` of the batch's examples; their losses do not matter."""
        index = column(batch, "index", len(self.logits), "training example")
        return self.logits[index].sigmoid()


class WeightNet(nn.Module):
    """v_i = V(ℓ_i; u): a net with one hidden layer that sees an example's loss alone.

    By default the lower level's objective is what is written above, in which the adapter moves
    v_i through ℓ_i: every estimator then sees one and the same function.

    Args:
        hidden: units of the hidden layer.
        detach: hold v_i constant while the adapter moves, as the published algorithm does. The
            lower level then follows no function's gradient, and differences of losses do not see
            what is held constant: use an estimator with exact products, such as
            ``"darts:product=exact"``.
    """

    def __init__(self, hidden: int = 100, *, detach: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.detach = detach

    def forward(self, losses: Tensor, batch: Any) -> Tensor:
        """The weights ``(n,)`` of examples with the ``losses`` ``(n,)``."""
        seen = losses.detach() if self.detach else losses
        weights: Tensor = self.net(seen[:, None]).sigmoid()[:, 0]
        return weights


class Weighted(Adapter):
    """Lower level: all that trains of the model, adapter and head, on noisy labels.

    Args:
        model: a Transformers model with an adapter; a classifier or a language model.
        weights: `SampleWeights`, `WeightNet`, or any module that takes the losses ``(n,)`` and
            the batch and returns the weights ``(n,)``.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(self, model: Any, weights: nn.Module, **level: Any) -> None:
        self.weights = weights
        super().__init__(model, **level)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Mean v_i ℓ_i; the mean weight and the mean loss without weights are logged."""
        losses = example_losses(self.model, batch)
        weights = self.weights(losses, batch)
        return {
            "loss": (weights * losses).mean(),
            "weight": weights.mean(),
            "task_loss": losses.mean(),
        }


class Clean(HeldOut):
    """Upper level: the parameters u of the weights, on clean labels; adapter and head are read."""
