"""Row norms of V = W0 + s·B·A without forming V.

    n_j² = ‖W0_j‖² + 2s ⟨(W0 Aᵀ)_j, B_j⟩ + s² ⟨B_j (A Aᵀ), B_j⟩

costs one pass over W0 and r columns; PEFT forms B·A and V. The dtype is the dtype of A and B,
float32 or wider. If V_j is much shorter than W0_j, the terms cancel, and n_j is computed from V_j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.utils.autograd import without_autocast

# Below this share of ‖W0_j‖², n_j² has lost two digits, and is computed from V_j instead.
CANCELLED = 1e-2


@torch.no_grad()
@without_autocast
def measure(w0: Tensor, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """n (out,) and V Aᵀ (out, r) for W0 (out, in), A (r, in), B (out, r), in the dtype of A and B.

    Neither has a graph. Reads from the device whether the terms of a row cancel.
    """
    w0_a = (a @ w0.to(a.dtype).T).T
    v_a = _v_a(w0_a, a, b, s)
    base = torch.linalg.vector_norm(w0, dim=1, dtype=a.dtype).square()
    squares = base + s * ((w0_a + v_a) * b).sum(1)
    norm = squares.clamp_min(0).sqrt()
    if not w0.is_meta and len(rows := (squares < CANCELLED * base).nonzero()[:, 0]):
        v = torch.addmm(w0[rows].to(a.dtype), b[rows], a, alpha=s)
        norm[rows] = torch.linalg.vector_norm(v, dim=1)
    return norm.clamp_min(torch.finfo(norm.dtype).tiny), v_a


class RowNorm(torch.autograd.Function):
    """n as a function of A and B, given n and V Aᵀ at their values.

        q = ∂L/∂n / n     ∂L/∂B = s·q ∘ (V Aᵀ)     ∂L/∂A = s·(q ∘ B)ᵀ V

    with V Aᵀ = W0 Aᵀ + s·B (A Aᵀ) and (q ∘ B)ᵀ V = (q ∘ B)ᵀ W0 + s·((q ∘ B)ᵀ B) A.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, w0: Tensor, norm: Tensor, v_a: Tensor, s: float) -> Tensor:
        """n of shape (out,)."""
        return norm.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the factors, V Aᵀ and n."""
        a, b, w0, _, v_a, ctx.s = inputs
        ctx.save_for_backward(a, b, w0, v_a, output)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of A and B; differentiable."""
        a, b, w0, v_a, norm = ctx.saved_tensors
        s, w0 = ctx.s, w0.to(a.dtype)
        if torch.is_grad_enabled():  # differentiated once more: V Aᵀ must be a function of A and B
            v_a = _v_a((a @ w0.T).T, a, b, s)
        q = s * dn / norm
        qb = (q * b.T).contiguous()
        da = torch.addmm(qb @ w0, qb @ b, a, alpha=s)
        return da, q[:, None] * v_a, None, None, None, None


def _v_a(w0_a: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    return torch.addmm(w0_a, b, a @ a.T, alpha=s)
