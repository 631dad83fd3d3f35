"""AutoLoRA: a rank for each layer, from weights of its rank-1 terms learned on validation data.

    upper: min over α          L(A*, B*, α; D_val)
    lower: A*, B*(α) = argmin over A, B, head   L(A, B, α; D_train) + decay·½(‖A‖² + ‖B‖²)

The update of a layer is ΔW = s·Σ_j p_j·B_:j A_j: with p = r·softmax(α), which is LoRA at α = 0.
Terms with p_j under a threshold are removed, and the adapter with the remaining ranks is trained on
all data. Zhang et al. 2024, arXiv:2403.09113, which has no decay. Its code has p = softmax(α), so
that ΔW starts at 1/r of LoRA's, and keeps terms by α itself: those with α_j/Σα of 1/r or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hyperopt_peft.method import (
    Gained,
    GainedLayer,
    Model,
    NonNegativeFloat,
    Share,
    add_gains,
    gained_layers,
    keep_terms,
    option,
)

#: Equal weights are kept, whatever their rounding.
ROUNDING = 1e-6


@dataclass
class AutoLoRA(Gained):
    """Weights of rank-1 terms above, A, B and head below; then an adapter of the selected ranks.

    **Without decay the hypergradient of a solved lower level is 0**: A and B absorb every p > 0, so
    that α moves only because the lower level is not at its minimum. With decay a term of small p
    needs large factors, whose decay is costly.

    The second phase is from scratch by default, as published. With ``retrain="warm"`` or
    ``"none"`` the remaining terms keep their learned weights; a control gives them equal ones.

    Raises:
        ProblemError: the decay is negative, or ``share`` no share; later, as `add_gains`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=4, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
        >>> method = AutoLoRA()
        >>> method.prepare(model)
        >>> for alpha in method.upper_variables(model).values():
        ...     alpha.data.copy_(torch.tensor([[0.0, 2.0, 2.0, -1.0]]))
        tensor([[ 0.,  2.,  2., -1.]])
        >>> plain = method.finish(model)
        >>> method.ranks
        {'0': 2}
    """

    threshold: float = option(1.0, help="least p of a term that remains; a layer's largest does")
    share: Share | None = option(
        None, help="in place of ``threshold`` the share of terms that remains, by p"
    )
    decay: NonNegativeFloat = option(0.0, help="the weight decay of A and B at the lower level")
    choose: Literal["weights", "sizes"] = option(
        "weights", help="what remains: by p, or as a control by the norm of terms"
    )

    defaults = {"hypergradient": "darts:scheme=forward", "retrain": "scratch"}

    def prepare(self, model: Model) -> None:
        """Let B be B·diag(p)."""
        add_gains(model, _weights, columns=True)

    def after_search(self, model: Model) -> None:
        """For the control, give weights to the same number of terms by their norms."""
        if self.choose == "weights":
            return
        layers = gained_layers(model)
        count = sum(int(keep.sum()) for keep in self._kept(layers))
        scores = [
            (each.gain.values() * each.b.norm(dim=0) * each.a.norm(dim=1)).float().cpu()
            for each in layers
        ]
        for each, keep in zip(layers, largest(scores, count), strict=True):
            each.gain.u.copy_(torch.where(keep, 0.0, -50.0).view_as(each.gain.u))

    def finish(self, model: Model) -> Any:
        """A model with a new adapter of the terms that remain; ``ranks`` has their numbers."""
        layers = gained_layers(model)
        kept = dict(zip([each.name for each in layers], self._kept(layers), strict=True))
        #: The rank of each layer, by its name in the base model.
        self.ranks = {name: int(keep.sum()) for name, keep in kept.items()}
        return keep_terms(model, kept)

    def _kept(self, layers: Sequence[GainedLayer]) -> list[Tensor]:
        """Which terms of each layer remain, ``(r,)`` each."""
        weights = [each.gain.values() for each in layers]
        if self.share is None:
            return [p >= min(self.threshold, float(p.max())) - ROUNDING for p in weights]
        return largest(weights, round(self.share * sum(map(len, weights))))


def _weights(alpha: Tensor) -> Tensor:
    """p = r·softmax(α); their mean is 1."""
    return alpha.shape[1] * alpha.softmax(1)


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` largest scores, at least one in each layer; ties are random.

    They are a function of the run's seed, so that a resumed run has the same ones.
    """
    values = [score.detach().double().cpu().clone() for score in scores]
    for value in values:
        value[value.argmax()] = torch.inf
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    flat, order = torch.cat(values), torch.randperm(sum(map(len, values)), generator=generator)
    best = order[flat[order].argsort(descending=True, stable=True)][: max(count, len(values))]
    mask = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, best, True)
    sizes = [len(value) for value in values]
    return [m.to(score.device) for m, score in zip(mask.split(sizes), scores, strict=True)]
