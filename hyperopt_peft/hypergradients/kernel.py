"""The implicit hypergradient on one page: a pure function of two losses and their variables.

At a minimum w*(u) of f(u, ·) the slope ∂f/∂w is zero for every u. With H = ∂²f/∂w², its derivative

    ∂²f/∂w∂u + H · dw*/du = 0     and the chain rule     dF/du = ∂F/∂u + (dw*/du)ᵀ ∂F/∂w     give

    dF/du = ∂F/∂u − ∂²f/∂u∂w · v,     H v = ∂F/∂w.

There is one linear system for any number of upper variables. H is only multiplied by vectors, each
time by one backward pass through the graph of ∂f/∂w (Pearlmutter 1994). The estimators of the
package approximate v; this module is a reference to read and to test against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]


def implicit_gradient(
    upper_loss: Loss, lower_loss: Loss, u: Tensors, w: Tensors
) -> tuple[Tensor, ...]:
    """dF/du at a minimum w of f(u, ·): one tensor for each tensor of ``u``, in its shape.

    ``upper_loss`` (F) and ``lower_loss`` (f) are functions of (u, w) that return a scalar. The
    system is solved with the dense H, for few unknowns.

    Example:
        >>> f = lambda u, w: (w[0] - 3.0).square().sum() + u[0] @ w[0].square()  # w* = 3/(1 + u)
        >>> u, w = [torch.tensor([1.0])], [torch.tensor([1.5])]
        >>> implicit_gradient(lambda u, w: w[0].sum(), f, u, w)  # −3/(1 + u)²
        (tensor([-0.7500]),)
    """
    u, w = ([x.detach().requires_grad_() for x in variables] for variables in (u, w))
    above = torch.autograd.grad(upper_loss(u, w), [*u, *w], materialize_grads=True)
    below = torch.autograd.grad(lower_loss(u, w), w, create_graph=True, materialize_grads=True)
    b, slope = _flat(above[len(u) :]), _flat(below)

    def product(v: Tensor, variables: Tensors) -> Tensors:
        return torch.autograd.grad(slope @ v, variables, retain_graph=True, materialize_grads=True)

    hessian = torch.stack([_flat(product(unit, w)) for unit in torch.eye(len(b)).to(b)])
    v = torch.linalg.solve(hessian, b)
    return tuple(d - m for d, m in zip(above, product(v, u)))


def _flat(parts: Tensors) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
