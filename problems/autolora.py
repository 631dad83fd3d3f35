"""AutoLoRA: a rank for each layer, from weights of its rank-1 terms learned on validation data.

    upper: min over α          L(A*, B*, α; D_val)
    lower: A*, B*(α) = argmin over A, B, head   L(A, B, α; D_train) + decay·½(‖A‖² + ‖B‖²)

The update of a layer is ΔW = s·Σ_j p_j·B_:j A_j: with p = r·softmax(α), which is LoRA at α = 0.
Terms with p_j under a threshold are removed, and the adapter with the remaining ranks is trained on
all data. Zhang et al. 2024, arXiv:2403.09113, which has no decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from hyperopt_peft.adapters.gains import (
    GainedLayer,
    add_gains,
    gain_variables,
    gained_layers,
    keep_terms,
    squares,
)
from hyperopt_peft.core.problem import TaskLoss
from hyperopt_peft.problems.common import regularised, require_weight
from hyperopt_peft.trainer.method import Method

#: Equal weights are kept, whatever their rounding.
ROUNDING = 1e-6


@dataclass
class AutoLoRA(Method):
    """Weights of rank-1 terms above, A, B and head below; then an adapter of the selected ranks.

    **Without decay the hypergradient of a solved lower level is 0**: A and B absorb every p > 0, so
    that α moves only because the lower level is not at its minimum. With decay a term of small p
    needs large factors, whose decay is costly.

    The second phase is from scratch by default, as published. With ``retrain="warm"`` or
    ``"none"`` the remaining terms keep what the search has learned.

    Args:
        threshold: the least p of a term that remains; a layer's largest always does.
        decay: of A and B at the lower level.
        choose: what decides where the ranks are, of which ``threshold`` gives the sum. As
            controls, the norms of the trained terms, which with an upper rate of 0 is magnitude
            pruning of LoRA, or a draw by the run's seed.

    Raises:
        ProblemError: the decay is negative; later, as `add_gains`.

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

    threshold: float = 1.0
    decay: float = 0.0
    choose: Literal["weights", "sizes", "random"] = "weights"

    defaults = MappingProxyType({"hypergradient": "darts:scheme=forward", "retrain": "scratch"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("decay", self.decay)

    def prepare(self, model: Any) -> None:
        """Let B be B·diag(p)."""
        add_gains(model, _weights, columns=True)

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """α of every layer."""
        return gain_variables(model)

    def lower_loss(self, model: Any, batch: Any, task_loss: TaskLoss) -> Any:
        """L + decay·½(‖A‖² + ‖B‖²), both metrics too; L alone in the second phase."""
        decay = self.decay if self.decay and gained_layers(model) else 0
        return regularised(task_loss(batch), decay, squares, model)

    def finish(self, model: Any) -> Any:
        """A model with a new adapter of the terms that remain; ``ranks`` has their numbers."""
        layers = gained_layers(model)
        kept, p = {}, [each.gain.values() for each in layers]
        for each, values in zip(layers, p, strict=True):
            kept[each.name] = values >= min(self.threshold, float(values.max())) - ROUNDING
        if self.choose != "weights":
            scores = torch.cat(p).cpu() * torch.cat([_sizes(each).cpu() for each in layers])
            if self.choose == "random":
                draw = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
                scores = torch.rand(len(scores), generator=draw)
            best = torch.zeros(len(scores), dtype=torch.bool)
            best[scores.topk(int(sum(each.sum() for each in kept.values()))).indices] = True
            parts = best.split([len(each) for each in p])
            kept = {n: part.to(kept[n].device) for n, part in zip(kept, parts, strict=True)}
        #: The rank of each layer, by its name in the base model.
        self.ranks = {name: int(keep.sum()) for name, keep in kept.items()}
        return keep_terms(model, kept)


def _sizes(layer: GainedLayer) -> Tensor:
    """‖B_:j‖·‖A_j:‖ of each term, ``(r,)``."""
    sizes: Tensor = layer.b.detach().norm(dim=0) * layer.a.detach().norm(dim=1)
    return sizes


def _weights(alpha: Tensor) -> Tensor:
    """p = r·softmax(α); their mean is 1."""
    return alpha.shape[1] * alpha.softmax(1)
