"""A comparison of gradients and second derivatives with central differences in float64.

    slope      ⟨∂L/∂x, d⟩  and  (L(x + hd) − L(x − hd))/2h              L is F or f, x = (u, w)
    curvature  ∂²f/∂x² d   and  (∂f/∂x(x + hd) − ∂f/∂x(x − hd))/2h

In float64, h is so short that a kink (ReLU, max, clamp) rarely lies between the ends. Kinks and
rounding also change a difference over 2h; this change is the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from hyperopt_peft.diagnostics.curvature import random_like
from hyperopt_peft.diagnostics.findings import Finding
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimate import MARGIN, WRONG_PRODUCT, disagreement
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import Objective, default_epsilon
from hyperopt_peft.utils.distributed import world_size
from hyperopt_peft.utils.precision import DoublePrecision, single_precision
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.vector import Vector, dot, normalised

SLOPE = 1e-5  # a relative error above this is a finding
ROUNDING = 1e-14  # the relative rounding error of a loss and a gradient


def wrong_derivatives(oracle: Oracle, seed: int) -> list[Finding]:
    """Findings at the point of an open oracle, by 11 passes and a product in float64.

    Second derivatives are compared only if the gradients are right and f has a double backward
    pass. A loss that cannot be evaluated in float64 may raise any exception.
    """
    upper, lower = oracle.upper, oracle.lower
    lower.require_single("its gradient is an estimate")
    if world_size() > 1:
        raise ProblemError("there are several processes")
    above = upper, oracle.upper_batch, oracle.upper_random
    below = lower, oracle.lower_batch, oracle.lower_random
    x, wrong = (*upper.variables, *lower.variables), []
    with single_precision(x, DoublePrecision), perturbed(x) as here:
        h = float(default_epsilon(here, "forward"))
        for level, batch, state in (above, below):
            f = Objective(level, upper, batch, state, oracle.passes, oracle.buffers, [])
            assign_(x, here)
            gradients = [f.gradient(x)]
            along = _direction(x, gradients[0], seed)
            for length in (h, -h, 2 * h, -2 * h):
                assign_(x, here, along.parts, length)
                gradients.append(f.gradient(x))
            losses, slope = to_floats(f.losses), dot(gradients[0], along)
            near, far = _differences(losses, h)
            kink = abs(losses[1] - 2 * losses[0] + losses[2]) / h  # at x itself
            error = MARGIN * abs(near - far) + kink + ROUNDING * abs(losses[0]) / h
            if abs(near - slope) > error + SLOPE * abs(near):
                words = (
                    f"the gradient is not the derivative of the loss: in one direction it gives "
                    f"the slope {slope:.4g}, and differences of the loss give {near:.4g}"
                )
                advice = (
                    "look for detach(), a straight-through estimate, a hook on a tensor, or a "
                    "custom autograd function with a wrong backward pass"
                )
                wrong.append(Finding("wrong gradient", "warning", level.name, words, advice))
        assign_(x, here)
        if not wrong and not lower.nested:
            with suppress(ProblemError):  # f has no double backward pass
                wrong = _wrong_curvature(oracle, along, gradients, h)
    return wrong


def _wrong_curvature(
    oracle: Oracle, along: Vector, gradients: list[Vector], h: float
) -> list[Finding]:
    levels, count = (oracle.upper, oracle.lower), len(oracle.upper.variables)
    with oracle.product("exact") as product:
        of_w, of_u = product.both(Vector(along.parts[count:]), Vector(along.parts[:count]))
    near, far = _differences(gradients, h)
    floor = 1e-6 * near.norm() + ROUNDING * gradients[0].norm() / h
    names = [f"{level.name}'s {name}" for level in levels for name in level.names]
    words = disagreement(names, (*of_u, *of_w), near, far, floor)
    kind = "wrong second derivative"
    return [Finding(kind, "error", oracle.lower.name, words, WRONG_PRODUCT)] if words else []


def _direction(x: Sequence[Tensor], gradient: Vector, seed: int) -> Vector:
    """A random direction plus the gradient's direction, with equal lengths in each variable."""
    parts = []
    for tensor, z, g in zip(x, random_like(x, seed), gradient):
        if tensor._backward_hooks and g.any():  # a mask is right on the entries that it passes
            z = z * (g != 0)
        parts.append(sum(v / v.norm().clamp(min=1e-300) for v in (z, g)))
    return normalised(Vector(parts))


def _differences(values: Sequence[Any], h: float) -> tuple[Any, Any]:
    """Central differences over h and 2h of the values at 0, h, −h, 2h and −2h."""
    _, ahead, behind, far_ahead, far_behind = values
    return (ahead - behind) * (0.5 / h), (far_ahead - far_behind) * (0.25 / h)
