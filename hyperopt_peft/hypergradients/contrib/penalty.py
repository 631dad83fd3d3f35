"""First-order estimators from minima of perturbed objectives near the current point."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, MovedGradients, Oracle
from hyperopt_peft.hypergradients.products import default_epsilon
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.validation import Fraction, NonNegativeInt
from hyperopt_peft.utils.vector import Vector, inner, machine_epsilon, normalised, zeros_like

#: (∂/∂u, ∂/∂w) of an objective.
Gradients = tuple[Vector, Vector]
GAMMA = 100.0  # the γ of `Penalty`, in units of F/f
#: The largest share of a central difference by which its two sides may differ unsaid.
BEND = 0.2
NOT_CONVEX = "the curvature of f along ∂F/∂w is not positive"


@dataclass(frozen=True)
class Minimum:
    """The result of an inner run: the point w + ``offset``, and the u-gradient there, ``of_u``.

    ``residual`` is the norm of the w-gradient divided by its norm at w; ``steps`` is the number of
    steps; ``note`` reports negative curvature.
    """

    offset: Vector
    of_u: Vector
    residual: float
    steps: int
    note: str = ""


@dataclass(frozen=True)
class InnerRuns(Estimator):
    """An estimator from minima of perturbed objectives near w, found by gradient descent.

    An inner run stops after ``inner_steps`` steps, when the gradient norm is ``tolerance`` times
    its value at w, or when the curvature along a step is not positive. The result is the point with
    the smallest gradient norm, w included. The step size is the shorter one of Barzilai & Borwein
    1988 (doi:10.1093/imanum/8.1.141): ⟨s, y⟩/⟨y, y⟩, if the last step s changed the gradient by y.
    """

    inner_steps: NonNegativeInt = field(default=100, kw_only=True)
    tolerance: Fraction = field(default=3e-3, kw_only=True)

    @property
    def requirements(self) -> Requirements:
        """Gradients at close points."""
        return Requirements(differences=True)

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        if oracle.upper_gradient.norm == 0:
            return Estimate(direct, zeros_like(direct), 0.0, 0, "∂F/∂w is zero", oracle.state)
        with oracle.moved() as gradients:
            at_w = gradients("lower", zeros_like(b))
            start = self.response(oracle, gradients, at_w[1])
            if start is None:
                return Estimate(direct, zeros_like(direct), 1.0, 0, NOT_CONVEX)
            return self.difference(oracle, gradients, at_w, start)

    @abstractmethod
    def difference(
        self, oracle: Oracle, gradients: MovedGradients, at_w: Gradients, start: Vector
    ) -> Estimate:
        """dF/du from gradients near w; ``at_w`` are f's gradients at w, ``start`` the response."""

    def response(self, oracle: Oracle, gradients: MovedGradients, slope: Vector) -> Vector | None:
        """An initial guess r of dw_ν/dν = −H⁻¹b at ν = 0; ``slope`` is ∂f/∂w at w.

        r minimises ‖Hr + b‖ over multiples of the last upper step's response. If f is not convex
        along it, multiples of −b are tried; r is None if f is not convex there either. Each costs
        one pass.
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
        self, gradient: Callable[[Vector], Gradients], at_w: Gradients, start: Vector
    ) -> Minimum:
        """The minimum near w of the objective with (∂/∂u, ∂/∂w) = ``gradient(x)`` at w + x.

        ``at_w`` is ``gradient(0)``; the run starts at w + ``start``.
        """
        of_u, slope = at_w
        scale, note = slope.norm(), ""
        before, x = zeros_like(start), start
        best = Minimum(before, of_u, 1.0, 0)
        for step in range(self.inner_steps + 1):
            of_u, newest = gradient(x)
            moved, change = x - before, newest - slope
            square, product, curvature = to_floats(
                [inner(newest, newest), inner(moved, change), inner(change, change)]
            )
            residual = math.sqrt(square) / scale
            if not math.isfinite(residual):
                raise NonFiniteError("a gradient of an inner run is not finite")
            if residual < best.residual:
                best = Minimum(x, of_u, residual, step)
            if residual <= self.tolerance or step == self.inner_steps:
                break
            if product <= 0:
                note = "negative curvature" if product else ""
                break
            before, slope, x = x, newest, x.plus(newest, -product / curvature)
            del moved, change
        return replace(best, note=note)


@register("penalty", kind="penalty", tolerance=0.1)
@dataclass(frozen=True)
class Penalty(InnerRuns):
    """dF/du ≈ ∂F/∂u(u, w) + γ(∂f/∂u(u, w) − ∂f/∂u(u, z)), z = argmin f − F/γ near w.

    The estimate is the u-gradient of F + γ(f − min_z f), with γ = 100 and an error of O(1/γ). It is
    a one-sided difference; `F2SA` is a central one. In the papers w descends f + F/γ. Here the
    lower steps descend f, and z solves ∂f/∂w(z) = ∂f/∂w(w) + (1/γ)·∂F/∂w(w), so that a remaining
    gradient of f at w, which γ would multiply, cancels.

    At most ``inner_steps`` gradient steps, which start from the last upper step's z − w, find z.
    Shen & Chen 2023, arXiv:2302.05185; Ye et al. 2022, arXiv:2209.08709.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("penalty:inner_steps=20").cost()
        25
    """

    def cost(self) -> int:
        """The cost if the run takes all ``inner_steps``."""
        return 5 + self.inner_steps

    def difference(
        self, oracle: Oracle, gradients: MovedGradients, at_w: Gradients, start: Vector
    ) -> Estimate:
        """The one-sided difference."""
        (of_u, slope), b = at_w, oracle.upper_gradient.b

        def gradient(offset: Vector) -> Gradients:
            f = gradients("lower", offset)
            return f[0], f[1].add_(slope, -1).add_(b, -1 / GAMMA)

        z = self.minimum(gradient, (of_u, b / -GAMMA), start / -GAMMA)
        direct, implicit = oracle.upper_gradient.direct, GAMMA * (of_u - z.of_u)
        state = {"response": -GAMMA * z.offset}
        return Estimate(direct, implicit, z.residual, z.steps, z.note, state)


@register("f2sa", kind="penalty", tolerance=0.1)
@dataclass(frozen=True)
class F2SA(InnerRuns):
    """dF/du ≈ [∂/∂u (f + νF)(u, w_ν) − ∂/∂u (f − νF)(u, w_−ν)] / 2ν, w_±ν = argmin_w f ± νF.

    With φ(ν, u) = min_w f + νF, ∂φ/∂ν = F(w_ν) and ∂φ/∂u = ∂/∂u (f + νF)(w_ν), so that dF/du is
    ∂²φ/∂ν∂u at ν = 0. The estimate is a central difference of ∂φ/∂u with an error of O(ν²).

    The formulas use f − ⟨∂f/∂w(w), ·⟩ in place of f. Its minimum is the current w, even if w does
    not minimise f on the batch. So the estimate tends to the implicit formula at w, as a solver
    does.

    ν is chosen so that w moves by at most `default_epsilon`, and ∂F/∂w changes by a relative
    δ^(1/3) at most, δ the machine epsilon. Each point costs a pass of f and one of F. Kwon et al.
    2023, arXiv:2301.10945 (one-sided); Chen et al. 2025, arXiv:2509.02937 (F2SA-2).

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("f2sa:inner_steps=20").cost()
        89
    """

    def cost(self) -> int:
        """The cost if both runs take all ``inner_steps``."""
        return 9 + 4 * self.inner_steps

    def difference(
        self, oracle: Oracle, gradients: MovedGradients, at_w: Gradients, start: Vector
    ) -> Estimate:
        """The central difference."""
        nu, direct = self._nu(oracle, gradients, start), oracle.upper_gradient.direct
        above = self._side(nu, oracle, gradients, at_w, nu * start)
        below = self._side(-nu, oracle, gradients, at_w, -above.offset)
        total = (above.of_u - below.of_u) / (2 * nu)
        bend = above.of_u + below.of_u - 2 * at_w[0]
        apart, moved = to_floats([inner(bend, bend), inner(total, total)])
        note = "the two sides differ" if math.sqrt(apart) > BEND * 2 * nu * math.sqrt(moved) else ""
        return Estimate(
            direct,
            total - direct,
            max(above.residual, below.residual),
            above.steps + below.steps,
            above.note or below.note or note,
            {"response": (above.offset - below.offset) / (2 * nu)},
        )

    def _nu(self, oracle: Oracle, gradients: MovedGradients, response: Vector) -> float:
        """ν, given dw_ν/dν ≈ ``response`` at ν = 0."""
        b = oracle.upper_gradient.b
        u, w = oracle.upper.variables, oracle.lower.variables
        epsilon, square = to_floats([default_epsilon(w, beside=u), inner(response, response)])
        nu = epsilon / math.sqrt(square)
        change = gradients("upper", nu * response)[1] - b
        changed, of_b = to_floats([inner(change, change), inner(b, b)])
        share = math.sqrt(changed / of_b)
        return float(nu * min(1.0, machine_epsilon(b) ** (1 / 3) / max(share, 1e-30)))

    def _side(
        self, nu: float, oracle: Oracle, gradients: MovedGradients, at_w: Gradients, start: Vector
    ) -> Minimum:
        """The minimum of f − ⟨∂f/∂w(w), ·⟩ + ``nu``·F near w."""
        of_u, slope = at_w
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b

        def gradient(offset: Vector) -> Gradients:
            f, upper_f = gradients("lower", offset), gradients("upper", offset)
            return f[0].add_(upper_f[0], nu), f[1].add_(slope, -1).add_(upper_f[1], nu)

        return self.minimum(gradient, (of_u + nu * direct, nu * b), start)
