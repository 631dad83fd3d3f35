"""Levels whose loss weights examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError


class WeightedExamples(Problem):
    """A level with the loss f = weighted(ℓ_1(w), …, ℓ_G(w); u), ℓ_g the loss of group g.

    A group is an example, or all examples of a source. Upper variables u are read by ``weighted``
    alone, and w by ``losses`` alone, through ``model``. A subclass defines ``groups``, ``losses``
    and ``weighted``, from which ``product="dots"`` takes ∂²f/∂u∂w; see `hypergradients.dots`.

    Example:
        >>> import torch
        >>> class Regression(WeightedExamples):
        ...     def __init__(self, model, logits):
        ...         self.model, self.logits = model, logits
        ...         super().__init__(model.named_parameters())
        ...     def groups(self, batch):
        ...         return torch.arange(len(batch["x"]))
        ...     def losses(self, batch):
        ...         return (self.model(batch["x"]) - batch["y"]).square().sum(1)
        ...     def weighted(self, losses, batch):
        ...         return (self.logits[batch["index"]].sigmoid() * losses).mean()
        >>> level = Regression(nn.Linear(3, 1), torch.zeros(9, requires_grad=True))
        >>> batch = {"x": torch.ones(2, 3), "y": torch.ones(2, 1), "index": torch.tensor([4, 7])}
        >>> level.losses(batch).shape, level.loss(batch).shape
        (torch.Size([2]), torch.Size([]))
    """

    #: The module that ``losses`` calls once, on all rows of a batch.
    model: nn.Module

    @property
    def examples(self) -> WeightedExamples:
        """This level."""
        return self

    def groups(self, batch: Any) -> Tensor:
        """The number of the group, from 0, of each row ``(n,)``, or of each token ``(n, T)``."""
        raise ProblemError(f"{self.name}: define groups(self, batch)")

    def losses(self, batch: Any) -> Tensor:
        """The loss ℓ_g of each group, ``(G,)``: the sum over its rows or tokens."""
        raise ProblemError(f"{self.name}: define losses(self, batch)")

    def weighted(self, losses: Tensor, batch: Any) -> Tensor | Mapping[str, Any]:
        """f of ``losses``, as `Problem.loss` returns it; does not call the model."""
        raise ProblemError(f"{self.name}: define weighted(self, losses, batch)")

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """``weighted(losses(batch), batch)``."""
        return self.weighted(self.losses(batch), batch)
