"""BiLoRA: singular values of an update learned on validation data, its vectors on training data.

    upper: min over Λ          L(P*, Q*, Λ; D_val)
    lower: P*, Q*(Λ) = argmin over P, Q, head   L(P, Q, Λ; D_train) + γ·R(P, Q)

The weight of a layer is W' = W0 + s·P Λ Q with a diagonal Λ. R = Σ over layers of
‖PᵀP − I‖² + ‖QQᵀ − I‖² is 0 where P has orthonormal columns and Q orthonormal rows. D_train and
D_val are disjoint parts of the training set. Qiang et al. 2024, arXiv:2403.13037, the variant with
real values in Λ; the scale of the other variants (softmax, nearly binary) is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.method import (
    Gained,
    Model,
    NonNegativeFloat,
    ProblemError,
    add_gains,
    gained_layers,
    option,
    remove_gains,
)


def orthogonality(model: Model) -> Tensor:
    """R, in float32 or wider, also under autocast."""
    terms = []
    for each in gained_layers(model):
        with torch.autocast(each.a.device.type, enabled=False):
            terms += [_distance(each.b.T), _distance(each.a)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _distance(rows: Tensor) -> Tensor:
    """‖M Mᵀ − I‖² of M (r, n)."""
    m = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (m @ m.T - torch.eye(len(m), dtype=m.dtype, device=m.device)).square().sum()


@dataclass
class BiLoRA(Gained):
    """Λ above, P, Q and head below; the saved adapter is plain LoRA, B = P Λ and A = Q.

    A trained adapter starts at the singular value decomposition of B·A, a new one at Λ = 0 with
    random P: R is at its minimum then, and ∂L/∂Λ is not zero. Without R a solved lower level
    absorbs every Λ, and the hypergradient is 0. A second phase, which the paper lacks, trains the
    plain adapter.

    Raises:
        ProblemError: γ is negative; later, as `add_gains`, or a rank is above the size of a weight.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model, method = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config), BiLoRA()
        >>> method.prepare(model)
        >>> [tuple(x.shape) for x in method.upper_variables(model).values()]
        [(1, 2)]
    """

    gamma: NonNegativeFloat = option(0.1, help="γ, the weight of R")

    defaults = {"hypergradient": "darts:scheme=forward", "retrain": "none"}
    penalty = ("gamma", orthogonality)

    def prepare(self, model: Model) -> None:
        """Let B be P Λ, with equal outputs."""
        for each in add_gains(model, torch.positive, columns=True):
            values = _decompose(each.name, each.a, each.b)
            each.gain.u.data.copy_(values.view_as(each.gain.u))

    def finish(self, model: Model) -> Any:
        """``model`` with B = P Λ."""
        remove_gains(model)
        return model


@torch.no_grad()
def _decompose(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Change A (r, in) and B (out, r) in place to Q and P; the singular values of B·A, (r,)."""
    rank, size = len(a), min(len(b), a.shape[1])
    if rank > size:
        raise ProblemError(
            f"{name}: has rank {rank}, its weight only {size}; give it one in rank_pattern"
        )
    # On the CPU, because some accelerators have no float64.
    wide_a, wide_b = (x.to("cpu", torch.float64) for x in (a, b))
    if new := not b.any():
        nn.init.orthogonal_(wide_b)
    left, r_left = torch.linalg.qr(wide_b)
    right, r_right = torch.linalg.qr(wide_a.T)
    u, values, vh = torch.linalg.svd(r_left @ r_right.T)
    a.copy_(vh @ right.T)
    b.copy_(left @ u)
    return torch.zeros_like(values) if new else values
