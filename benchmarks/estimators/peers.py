"""Hypergradients of other libraries, and of plain loops, for any two Problems.

Each library's own function gets the same losses and the same ∂F/∂w. Betty's wheel refuses newer
interpreters, so it is installed separately:
``pip install --no-deps --ignore-requires-python betty-ml==0.2.1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from hyperopt_peft import Problem
from hyperopt_peft.hypergradients import Vector
from hyperopt_peft.utils.restore import assign_, perturbed

Peer = Callable[[Problem, Problem], Vector]


def _parts(upper: Problem, lower: Problem) -> tuple[Vector, tuple[Tensor, ...]]:
    """∂F/∂u and ∂F/∂w."""
    u, w = upper.variables, lower.variables
    loss, _ = upper.evaluate(upper.peek_batch())
    gradient = grad(loss, (*u, *w), materialize_grads=True)
    return Vector(gradient[: len(u)]), gradient[len(u) :]


#: The options of Betty's Config for each of its functions.
CONFIGS: dict[str, dict[str, Any]] = {
    "darts": {"darts_alpha": 0.01, "darts_multitask": False},
    "neumann": {"neumann_iterations": 20, "neumann_alpha": 1.0},
    "cg": {"cg_iterations": 10, "cg_alpha": 1.0},
}
BETTY = f"Betty {version('betty-ml')}" if find_spec("betty") else ""


def betty_term(method: str, upper: Problem, lower: Problem, b: Sequence[Tensor]) -> Vector:
    """The implicit term by Betty's function ``method`` from ∂F/∂w; w may be displaced then."""
    from betty.hypergradient import jvp_fn_mapping

    below = SimpleNamespace(
        meta_trainable_parameters=lambda: lower.variables,
        trainable_parameters=lambda: lower.variables,
        parameters=lambda: lower.variables,
        training_step_exec=lambda batch: lower.evaluate(batch)[0],
        cur_batch=lower.peek_batch(),
        loss=None,
        paths=[],
        config=SimpleNamespace(**CONFIGS[method]),
        _strategy="default",
    )
    above = SimpleNamespace(trainable_parameters=lambda: upper.variables)
    return Vector(jvp_fn_mapping[method](b, below, above, False))


def betty(method: str, upper: Problem, lower: Problem) -> Vector:
    """The hypergradient by Betty's function ``method``."""
    direct, b = _parts(upper, lower)
    with perturbed(lower.variables):
        return direct + betty_term(method, upper, lower, b)


def torchopt_cg(steps: int, upper: Problem, lower: Problem) -> Vector:
    """TorchOpt's conjugate gradients on the Hessian."""
    import torchopt

    solve = torchopt.linear_solve.solve_cg(maxiter=steps, rtol=0.0, atol=0.0)
    return _solved(lambda matvec, b: solve(matvec, b), upper, lower)


def plain(solve: Callable[..., Sequence[Tensor]], upper: Problem, lower: Problem) -> Vector:
    """A loop of a few lines, as in hypertorch: one retained graph, no checks."""
    return _solved(solve, upper, lower)


def _solved(solve: Callable[..., Sequence[Tensor]], upper: Problem, lower: Problem) -> Vector:
    direct, b = _parts(upper, lower)
    loss, _ = lower.evaluate(lower.peek_batch())
    gradient = grad(loss, lower.variables, create_graph=True)

    def matvec(v: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return grad(gradient, lower.variables, tuple(v), retain_graph=True)

    v = tuple(solve(matvec, b))
    mixed = grad(gradient, upper.variables, v, materialize_grads=True)
    return direct - Vector(mixed)


def fixed_point(step: float, terms: int, matvec: Any, b: Sequence[Tensor]) -> list[Tensor]:
    """v ← v − step·(Hv − b) from zero."""
    v = [torch.zeros_like(x) for x in b]
    for _ in range(terms):
        v = [x - step * (h - y) for x, h, y in zip(v, matvec(v), b)]
    return v


def independent_difference(upper: Problem, lower: Problem) -> Vector:
    """The usual central difference, ε = 0.01/‖b‖; each pass has its own dropout masks."""
    direct, b = _parts(upper, lower)
    length = Vector(b).norm()
    sides = []
    with perturbed(lower.variables) as point:
        for sign in (1, -1):
            assign_(lower.variables, point, b, sign * 0.01 / length)
            gradient = lower.gradient(lower.peek_batch(), upper.variables).gradient
            sides.append(Vector.of(gradient, upper.variables))
    return direct - (sides[0] - sides[1]) * (length / 0.02)


def conjugate_gradients(
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]], b: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Hestenes and Stiefel's recurrence from zero, without any test."""

    def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Any:
        return sum((a * c).sum() for a, c in zip(x, y))

    v, r, p = [torch.zeros_like(x) for x in b], list(b), list(b)
    rho = dot(r, r)
    for _ in range(steps):
        q = product(p)
        alpha = rho / dot(p, q)
        v = [x + alpha * y for x, y in zip(v, p)]
        r = [x - alpha * y for x, y in zip(r, q)]
        rho, previous = dot(r, r), rho
        p = [x + rho / previous * y for x, y in zip(r, p)]
    return v


def peers() -> tuple[dict[str, Peer], list[str]]:
    """The installed peers, by a name with their known fault, and the missing ones."""
    installed: dict[str, Peer] = {
        "loop: difference, ε = 0.01/‖b‖": independent_difference,
        "loop: fixed point (20), step 0.1": partial(plain, partial(fixed_point, 0.1, 20)),
        "loop: cg (10)": partial(plain, partial(conjugate_gradients, steps=10)),
    }
    missing = []
    if BETTY:
        installed[f"{BETTY} darts: H⁻¹ = I"] = partial(betty, "darts")
        installed[f"{BETTY} neumann (20): step 1 by default"] = partial(betty, "neumann")
        installed[f"{BETTY} cg (10): wrong second direction"] = partial(betty, "cg")
    else:
        missing.append("Betty (pip install --no-deps --ignore-requires-python betty-ml==0.2.1)")
    if find_spec("torchopt"):
        installed[f"TorchOpt {version('torchopt')} cg (10)"] = partial(torchopt_cg, 10)
    else:
        missing.append("TorchOpt (pip install torchopt)")
    return installed, missing
