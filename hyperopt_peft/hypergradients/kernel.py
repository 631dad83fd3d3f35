"""The implicit hypergradient on one page: a pure function of two losses and their variables.

At a minimum w*(u) of f(u, ·) the slope ∂f/∂w is zero for every u. With H = ∂²f/∂w², its derivative

    ∂²f/∂w∂u + H · dw*/du = 0     and the chain rule     dF/du = ∂F/∂u + (dw*/du)ᵀ ∂F/∂w     give

    dF/du = ∂F/∂u − ∂²f/∂u∂w · v,     H v = ∂F/∂w.

There is one linear system for any number of upper variables. H is only multiplied by vectors, each
time by one backward pass through the graph of ∂f/∂w (Pearlmutter 1994). `implicit_term` is the last
formula, for `Solver` too: there the products come from an `Oracle`, and v from a solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils.vector import Vector

Tensors = Sequence[Tensor]
Loss = Callable[[Tensors, Tensors], Tensor]
Matvec = Callable[[Vector], Vector]
Solve = Callable[[Matvec, Vector], Vector]


def implicit_term(hessian: Matvec, mixed: Matvec, b: Vector, solve: Solve) -> Vector:
    """−∂²f/∂u∂w · v, where ``solve(hessian, b)`` is v ≈ H⁻¹b.

    ``hessian`` maps v to Hv, and ``mixed`` to ∂²f/∂u∂w · v.
    """
    v = solve(hessian, b)
    return mixed(v).mul_(-1.0)


def dense_solve(matvec: Matvec, b: Vector) -> Vector:
    """H⁻¹b from the dense H, for few unknowns."""
    rhs = b.flat()
    rows = [matvec(b.with_entries(unit)).flat() for unit in torch.eye(len(rhs)).to(rhs)]
    return b.with_entries(torch.linalg.solve(torch.stack(rows), rhs))


def implicit_gradient(
    upper_loss: Loss, lower_loss: Loss, u: Tensors, w: Tensors, solve: Solve = dense_solve
) -> tuple[Tensor, ...]:
    """dF/du at a minimum w of f(u, ·): one tensor for each tensor of ``u``, in its shape.

    ``upper_loss`` (F) and ``lower_loss`` (f) are functions of (u, w) that return a scalar.
    ``solve`` computes v from the function v ↦ Hv and ∂F/∂w, vectors in the shapes of ``w``.

    Example:
        >>> f = lambda u, w: (w[0] - 3.0).square().sum() + u[0] @ w[0].square()  # w* = 3/(1 + u)
        >>> u, w = [torch.tensor([1.0])], [torch.tensor([1.5])]
        >>> implicit_gradient(lambda u, w: w[0].sum(), f, u, w)  # −3/(1 + u)²
        (tensor([-0.7500]),)
    """
    u, w = ([x.detach().requires_grad_() for x in variables] for variables in (u, w))
    above = torch.autograd.grad(upper_loss(u, w), [*u, *w], materialize_grads=True)
    direct, b = Vector(above[: len(u)]), Vector(above[len(u) :])
    slope = torch.autograd.grad(lower_loss(u, w), w, create_graph=True, materialize_grads=True)

    def product(v: Vector, variables: Tensors) -> Vector:
        along = torch.stack([(g * x).sum() for g, x in zip(slope, v, strict=True)]).sum()
        parts = torch.autograd.grad(along, variables, retain_graph=True, materialize_grads=True)
        return Vector(parts)

    implicit = implicit_term(lambda v: product(v, w), lambda v: product(v, u), b, solve)
    return (direct + implicit).parts
