"""How much of each data source to train on, learnt on the data that matter.

    upper: min over u   L(w*(u); validation data of the target)
    lower: w*(u) = argmin over the adapter w   Σ_s p_s L_s(w),   p = softmax(u)

where L_s is the mean loss of the examples from source s. Pan et al. 2024 (ScaleBiO),
arXiv:2406.19976.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import Adapter
from hyperopt_peft.problems.example_weights import HeldOut, column, example_losses


class SourceWeights(nn.Module):
    """p = softmax(u): a weight for each of the sources ``names``, all equal at first."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
            raise ProblemError(f"give two or more sources, each a name of its own, got {names!r}")
        self.names = list(names)
        self.logits = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self) -> Tensor:
        """The weights ``(number of sources,)``, which add up to 1."""
        return self.logits.softmax(0)


class Mixture(Adapter):
    """Lower level: all that trains of the model, on examples of all sources.

    Batches say in the column ``source`` where each example is from, a number from 0 in the order
    of ``weights.names``. A source that a batch lacks adds nothing to its loss, so give every
    source about as many examples, or batches that are large enough to hold each.

    Args:
        model: a Transformers model with an adapter; a language model or a classifier.
        weights: the mixture.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(self, model: Any, weights: SourceWeights, **level: Any) -> None:
        self.weights = weights
        super().__init__(model, **level)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Σ_s p_s · mean loss of source s; p is logged by name."""
        weights, names = self.weights(), self.weights.names
        source = column(batch, "source", len(names), "source")
        losses = example_losses(self.model, batch)
        share = weights[source] / source.bincount()[source]
        logged = {f"weight_{name}": p for name, p in zip(names, weights.detach(), strict=True)}
        return {"loss": (share * losses).sum(), **logged}


class Target(HeldOut):
    """Upper level: the logits u of the mixture, on the target's data; the adapter is read."""
