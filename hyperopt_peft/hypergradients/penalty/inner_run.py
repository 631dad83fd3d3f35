"""Short runs of gradient descent from w to a minimum nearby, and back: gradients alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Gradients, Oracle
from hyperopt_peft.hypergradients.products import default_epsilon
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.vector import Vector, inner, normalised, zeros_like

NOT_CONVEX = "the curvature of f along ∂F/∂w is not positive"


@dataclass(frozen=True)
class Minimum:
    """Where an inner run ended: w + ``offset``, and ∂/∂u of its objective there.

    ``residual`` is the norm of the gradient relative to that at w, ``steps`` the steps taken
    until then, ``note`` whether the curvature was not positive.
    """

    offset: Vector
    of_u: Vector
    residual: float
    steps: int
    note: str = ""


@dataclass(frozen=True)
class InnerRuns(Estimator):
    """An estimator that compares f at minima near w, which it finds by first-order passes.

    A run takes at most ``inner_steps`` gradient steps. It ends where the gradient has shrunk to
    ``tolerance`` of that at w, or the curvature along a step was not positive; of all its points,
    w among them, that of least gradient counts. On quadratics the default ``tolerance`` ends a run
    after about 15 steps at a condition number of 10 and 45 at 112, with an error of at most 1 % of
    the hypergradient; the default ``inner_steps`` ends runs at 1000.

    ``step_size`` is what a gradient is multiplied by; None takes the shorter one of Barzilai &
    Borwein 1988 (doi:10.1093/imanum/8.1.141), ⟨s, y⟩/⟨y, y⟩ after a step s that changed the
    gradient by y. ``damping`` adds ½ damping‖x‖² to the objective at w + x, for an f that is not
    convex at w.
    """

    inner_steps: int = field(default=100, kw_only=True)
    step_size: float | None = field(default=None, kw_only=True)
    tolerance: float = field(default=3e-3, kw_only=True)
    damping: float = field(default=0.0, kw_only=True)

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(
            self.inner_steps >= 0, f"inner_steps must not be negative, got {self.inner_steps}"
        )
        self.require(self.step_size is None or self.step_size > 0, "step_size must be positive")
        self.require(0 <= self.tolerance < 1, f"tolerance must be in [0, 1), got {self.tolerance}")
        self.require(self.damping >= 0, f"damping must not be negative, got {self.damping}")

    def response(self, oracle: Oracle, gradients: Gradients, slope: Vector) -> Vector | None:
        """What dw/dν = −H⁻¹b is taken to be at first, w the minimum of f + νF.

        It is a multiple of what the last upper step found, or else of −b: that which leaves the
        least gradient, from one pass each. It is None where neither leaves less than b, since f
        is not convex along them. ``slope`` is ∂f/∂w at w.
        """
        b = oracle.upper_gradient.b
        u, w = oracle.upper.variables, oracle.lower.variables
        epsilon = default_epsilon(w, beside=u)
        for direction in (oracle.state.get("response"), -b):
            if not isinstance(direction, Vector):
                continue
            probe = normalised(direction) * epsilon
            change = (gradients("lower", probe)[1] - slope).add_(probe, self.damping)
            product, square = to_floats([inner(b, change), inner(change, change)])
            if not math.isfinite(product):
                raise NonFiniteError("a gradient beside w is not finite")
            if product < 0:
                return probe * (-product / square)
        return None

    def minimum(
        self,
        gradient: Callable[[Vector], tuple[Vector, Vector]],
        at_w: tuple[Vector, Vector],
        start: Vector,
    ) -> Minimum:
        """The minimum near w of the objective whose (∂/∂u, ∂/∂w) at w + x are ``gradient(x)``.

        ``at_w`` are those at w itself, and w + ``start`` is the run's first point.
        """
        of_u, slope = at_w
        scale, note = slope.norm(), ""
        before, x = zeros_like(start), start
        best = Minimum(before, of_u, 1.0, 0)
        for taken in range(self.inner_steps + 1):
            of_u, newest = gradient(x)
            newest.add_(x, self.damping)
            moved, change = x - before, newest - slope
            square, product, curvature = to_floats(
                [inner(newest, newest), inner(moved, change), inner(change, change)]
            )
            residual = math.sqrt(square) / scale
            if not math.isfinite(residual):
                raise NonFiniteError("a gradient of an inner run is not finite")
            if residual < best.residual:
                best = Minimum(x, of_u, residual, taken)
            if residual <= self.tolerance or taken == self.inner_steps:
                break
            if product <= 0:
                note = "negative curvature" if product else ""
                break
            length = self.step_size or product / curvature
            before, slope, x = x, newest, x.plus(newest, -length)
            del moved, change
        return replace(best, note=note)
