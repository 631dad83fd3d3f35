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
Solve = Callable[[Callable[[Tensors], Tensors], Tensors], Tensors]


def dense_solve(matvec: Callable[[Tensors], Tensors], b: Tensors) -> Tensors:
    """H⁻¹b from the dense H, for few unknowns."""
    rhs = torch.cat([x.flatten() for x in b])
    parts = [torch.eye(len(rhs)).to(rhs)[i].split([x.numel() for x in b]) for i in range(len(rhs))]
    columns = [matvec([p.view_as(x) for p, x in zip(unit, b)]) for unit in parts]
    hessian = torch.stack([torch.cat([x.flatten() for x in column]) for column in columns])
    solution = torch.linalg.solve(hessian, rhs).split([x.numel() for x in b])
    return [part.view_as(x) for part, x in zip(solution, b)]


def implicit_gradient(
    upper_loss: Loss, lower_loss: Loss, u: Tensors, w: Tensors, solve: Solve = dense_solve
) -> tuple[Tensor, ...]:
    """dF/du at a minimum w of f(u, ·): one tensor for each tensor of ``u``, in its shape.

    ``upper_loss`` (F) and ``lower_loss`` (f) are functions of (u, w) that return a scalar.
    ``solve`` computes v from the function v ↦ Hv and ∂F/∂w, both in the shapes of ``w``.

    Example:
        >>> f = lambda u, w: (w[0] - 3.0).square().sum() + u[0] @ w[0].square()  # w* = 3/(1 + u)
        >>> u, w = [torch.tensor([1.0])], [torch.tensor([1.5])]
        >>> implicit_gradient(lambda u, w: w[0].sum(), f, u, w)  # −3/(1 + u)²
        (tensor([-0.7500]),)
    """
    u, w = ([x.detach().requires_grad_() for x in variables] for variables in (u, w))
    above = torch.autograd.grad(upper_loss(u, w), [*u, *w], materialize_grads=True)
    slope = torch.autograd.grad(lower_loss(u, w), w, create_graph=True, materialize_grads=True)

    def product(v: Tensors, variables: Tensors) -> Tensors:
        along = torch.stack([(g * x).sum() for g, x in zip(slope, v, strict=True)]).sum()
        return torch.autograd.grad(along, variables, retain_graph=True, materialize_grads=True)

    v = solve(lambda v: product(v, w), above[len(u) :])
    return tuple(d - m for d, m in zip(above, product(v, u)))
