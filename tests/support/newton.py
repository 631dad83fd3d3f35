"""The lower optimum by Newton's method, without any code of the estimators."""

from typing import Any

import torch
from torch import Tensor

from hyperopt_peft import Problem


def derivatives(lower: Problem, batch: Any = None) -> tuple[Tensor, Tensor]:
    """∂f/∂w and ∂²f/∂w², dense."""
    (w,) = lower.variables
    loss, _ = lower.evaluate(batch)
    gradient = torch.autograd.grad(loss, w, create_graph=True)[0].reshape(-1)
    unit = torch.eye(w.numel(), dtype=w.dtype)
    hessian = torch.autograd.grad(gradient, w, unit, is_grads_batched=True)[0]
    return gradient.detach(), hessian.reshape(len(unit), -1)


def minimise(
    lower: Problem, hessian: Tensor | None = None, batch: Any = None, tolerance: float = 1e-13
) -> Tensor:
    """Newton's method to rounding; a ``hessian`` of a close point is used throughout."""
    (w,) = lower.variables
    for _ in range(30):
        if hessian is None:
            gradient, newest = derivatives(lower, batch)
        else:
            (part,) = lower.gradient(batch, [w]).gradient
            assert part is not None
            gradient, newest = part.reshape(-1), hessian
        if gradient.norm() < tolerance:
            return newest
        with torch.no_grad():
            w -= torch.linalg.solve(newest, gradient).reshape(w.shape)
    raise AssertionError(f"Newton's method ends at a gradient of norm {gradient.norm():.3g}")
