"""Short runs of gradient descent from w to the minimum of a perturbed objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import MovedGradients, Oracle
from hyperopt_peft.hypergradients.products import default_epsilon
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.validation import Fraction, NonNegativeInt
from hyperopt_peft.utils.vector import Vector, inner, normalised, zeros_like

NOT_CONVEX = "the curvature of f along ∂F/∂w is not positive"


@dataclass(frozen=True)
class Minimum:
    """The result of an inner run: the point w + ``offset``, and ∂/∂u of the objective there.

    ``residual`` is the gradient's norm divided by its norm at w; ``steps`` is the number of steps;
    ``note`` reports negative curvature.
    """

    offset: Vector
    of_u: Vector
    residual: float
    steps: int
    note: str = ""


@dataclass(frozen=True)
class InnerRuns(Estimator):
    """An estimator from the minima of perturbed objectives near w, by gradient descent.

    A run stops after ``inner_steps`` steps, at a gradient norm of ``tolerance`` times that at w, or
    at a step along which the curvature is not positive. The result is the point of least gradient
    norm, w included. On quadratics with condition numbers 10 and 112 the default ``tolerance``
    needs about 15 and 45 steps, for an error of at most 1 % of the hypergradient.

    The step size is the shorter one of Barzilai & Borwein 1988 (doi:10.1093/imanum/8.1.141),
    ⟨s, y⟩/⟨y, y⟩ for the last step s and its change y of the gradient.
    """

    inner_steps: NonNegativeInt = field(default=100, kw_only=True)
    tolerance: Fraction = field(default=3e-3, kw_only=True)

    @property
    def requirements(self) -> Requirements:
        """Gradients at close points."""
        return Requirements(differences=True)

    def response(self, oracle: Oracle, gradients: MovedGradients, slope: Vector) -> Vector | None:
        """An initial guess r of dw_ν/dν = −H⁻¹b at ν = 0; ``slope`` is ∂f/∂w at w.

        r minimises ‖Hr + b‖ over multiples of the last upper step's response, or of −b if f is not
        convex along the former, by one pass each. r is None if f is not convex along either.
        """
        b = oracle.upper_gradient.b
        u, w = oracle.upper.variables, oracle.lower.variables
        epsilon = default_epsilon(w, beside=u)
        for direction in (oracle.state.get("response"), -b):
            if not isinstance(direction, Vector):
                continue
            probe = normalised(direction) * epsilon
            change = gradients("lower", probe)[1] - slope
            product, square = to_floats([inner(b, change), inner(change, change)])
            if not math.isfinite(product):
                raise NonFiniteError("a gradient near w is not finite")
            if product < 0:
                return probe * (-product / square)
        return None

    def minimum(
        self,
        gradient: Callable[[Vector], tuple[Vector, Vector]],
        at_w: tuple[Vector, Vector],
        start: Vector,
    ) -> Minimum:
        """The minimum near w of an objective whose (∂/∂u, ∂/∂w) at w + x is ``gradient(x)``.

        ``at_w`` is ``gradient(0)``; the run starts at w + ``start``.
        """
        of_u, slope = at_w
        scale, note = slope.norm(), ""
        before, x = zeros_like(start), start
        best = Minimum(before, of_u, 1.0, 0)
        for taken in range(self.inner_steps + 1):
            of_u, newest = gradient(x)
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
            before, slope, x = x, newest, x.plus(newest, -product / curvature)
            del moved, change
        return replace(best, note=note)
