"""Weights of data sources, learnt on validation data of a target task.

    upper: min over u   L(w*(u); validation data of the target)
    lower: w*(u) = argmin over the adapter w   Σ_s p_s L_s(w),   p = softmax(u)

L_s is the mean loss of the examples of source s. Pan et al. 2024 (ScaleBiO), arXiv:2406.19976.
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
    """p = softmax(u), a weight for each of the sources ``names``; initially u = 0.

    Raises:
        ProblemError: there are fewer than two names, or two equal ones.

    Example:
        >>> SourceWeights(["wiki", "code"])().tolist()
        [0.5, 0.5]
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
            raise ProblemError(f"names: must be two or more different sources, got {names!r}")
        self.names = list(names)
        self.logits = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self) -> Tensor:
        """p, ``(number of sources,)``; the sum is 1."""
        return self.logits.softmax(0)


class Mixture(Adapter):
    """Lower level: min over the trainable parameters w of Σ_s p_s L_s(w).

    The column ``source`` of a batch has the source of each example, a number from 0 in the order
    of ``weights.names``. A source without an example in the batch adds nothing to the loss. So
    batches should be large enough to have examples of every source.

    Args:
        model: a Transformers model with an adapter, for classification or language modelling.
        weights: the weights p.
        level: as in `TaskLevel`.

    Raises:
        ProblemError: no parameter of the model is trainable; or as `Problem`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> lower = Mixture(model, SourceWeights(["wiki", "code"]))
        >>> ids, labels = torch.ones(2, 4, dtype=torch.int64), torch.tensor([0, 1])
        >>> sorted(lower.loss({"input_ids": ids, "labels": labels, "source": labels}))
        ['loss', 'weight_code', 'weight_wiki']
    """

    def __init__(self, model: Any, weights: SourceWeights, **level: Any) -> None:
        self.weights = weights
        super().__init__(model, **level)

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Σ_s p_s L_s; each p_s is a metric, ``weight_`` and the source's name."""
        weights, names = self.weights(), self.weights.names
        source = column(batch, "source", len(names), "source")
        losses = example_losses(self.model, batch)
        share = weights[source] / source.bincount()[source]
        logged = {f"weight_{name}": p for name, p in zip(names, weights.detach(), strict=True)}
        return {"loss": (share * losses).sum(), **logged}


class Target(HeldOut):
    """Upper level: min over the logits u of L(w; validation data of the target).

    Example:
        >>> Target(SourceWeights(["wiki", "code"]), model=None).names
        ('logits',)
    """
