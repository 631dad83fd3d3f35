"""Short runs of gradient descent from w to a minimum nearby, and back: gradients alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Gradients, Oracle
from hyperopt_peft.hypergradients.products import default_radius
from hyperopt_peft.hypergradients.vector import Vector, dot, zeros_like


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

    A run takes at most ``inner_steps`` gradient steps and ends where the gradient has shrunk to
    ``tolerance`` of that at w; its point of least gradient counts. ``step`` is the length of a
    step per gradient; None takes Barzilai and Borwein's 1988 (doi:10.1093/imanum/8.1.141), the
    reciprocal of the curvature along the last step, or of its modulus where it is negative.
    """

    inner_steps: int = field(default=15, kw_only=True)
    step: float | None = field(default=None, kw_only=True)
    tolerance: float = field(default=1e-4, kw_only=True)

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(
            self.inner_steps >= 0, f"inner_steps must not be negative, got {self.inner_steps}"
        )
        self.require(self.step is None or self.step > 0, "step must be positive")
        self.require(0 <= self.tolerance < 1, f"tolerance must be in [0, 1), got {self.tolerance}")

    def response(self, oracle: Oracle, gradients: Gradients, slope: Vector) -> Vector:
        """What dw/dν = −H⁻¹b is taken to be at first, w the minimum of f + νF.

        It is what the last upper step found, or −b/κ with κ the curvature of f along b, from one
        pass; zero where there is no curvature. ``slope`` is ∂f/∂w at w.
        """
        kept, b = oracle.state.get("response"), oracle.upper_gradient.b
        if isinstance(kept, Vector) and kept.norm() > 0:
            return kept
        probe = b * (-default_radius(Vector(oracle.lower.variables), sides=2) / b.norm())
        curvature = dot(gradients("lower", probe)[1] - slope, probe) / dot(probe, probe)
        return zeros_like(b) if curvature == 0 else b / -abs(curvature)

    def minimum(
        self, gradient: Callable[[Vector], tuple[Vector, Vector]], at_w: Vector, start: Vector
    ) -> Minimum:
        """The minimum near w of the objective whose partial gradients at w + x are ``gradient(x)``.

        ``at_w`` is its gradient with respect to w at w itself, where the run comes from, and w +
        ``start`` its first point.
        """
        scale, best, note = at_w.norm(), None, ""
        before, slope, x, length = zeros_like(start), at_w, start, self.step or 0.0
        for taken in range(self.inner_steps + 1):
            of_u, newest = gradient(x)
            residual = newest.norm() / scale
            if best is None or residual < best.residual:
                best = Minimum(x, of_u, residual, taken)
            if residual <= self.tolerance:
                break
            moved, change = x - before, newest - slope
            product = dot(moved, change)
            if product < 0:
                note = "negative curvature"
            if self.step is None and product:
                length = dot(moved, moved) / abs(product)
            before, slope, x = x, newest, x - length * newest
        assert best is not None
        return Minimum(best.offset, best.of_u, best.residual, best.steps, note)
