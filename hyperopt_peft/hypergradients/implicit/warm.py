"""A Hessian solve that continues from the solution of the last upper step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, cast

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.implicit.solver import (
    Matvec,
    Solution,
    Solver,
    power_iteration,
    require_finite,
)
from hyperopt_peft.hypergradients.oracle import State
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.validation import Bound, NonNegativeFloat, PositiveFloat, PositiveInt
from hyperopt_peft.utils.vector import Vector, inner, normalised, zeros_like

FIRST_STEPS = 20  # Neumann and power iteration steps before the first upper step
FORGET = 0.97  # decay of λmax per upper step, since it is far larger on a few batches
TILT = 0.1  # share of the residual, where a divergence shows, in the power iteration's vector


@register("warm", kind="implicit", tolerance=0.15)
@dataclass(frozen=True)
class WarmStart(Solver):
    """v ← v − (a/k^decay)·((H + damping·I)v − b) at the k-th upper step, from the previous v.

    The hypergradient uses the v of the previous upper step; then v moves by ``steps`` such steps.
    So v is independent of the current batch, and averages H and b over earlier batches: if u and w
    do not move, the mean of v is H⁻¹b. The first upper step, and a call outside training, begins
    with 20 constant steps from a·b, as in a Neumann series.

    ``step_size`` is a; None sets a = 1/(λmax + damping), with λmax from a power iteration that also
    continues over upper steps. A small ``decay`` follows moving levels faster; a large one averages
    more batches. If vᵀ(H + damping·I)v is negative, v and k are reset, and ``note`` says so. Each
    step costs one Hessian-vector product, and λmax one more for each upper step. SOBA: Dagréou et
    al. 2022, arXiv:2201.13409 Eq. 5–6; AmIGO: Arbel & Mairal 2022, arXiv:2111.14580.

    Raises:
        NonFiniteError: v diverges, since ``step_size`` is too large for H.

    Example:
        >>> from torch import tensor
        >>> h, b = Vector([tensor([1.0, 4.0])]), Vector([tensor([1.0, 1.0])])  # H = diag(1, 4)
        >>> first, state = WarmStart().advance(lambda v: h * v, b, {})
        >>> second, _ = WarmStart().advance(lambda v: h * v, b, state)
        >>> second.residual < first.residual
        True
    """

    steps: PositiveInt = 1
    step_size: PositiveFloat | None = None
    decay: Annotated[float, Bound("≥", 0), Bound("≤", 1)] = 0.5
    damping: NonNegativeFloat = 0.0

    def cost(self) -> int:
        """The cost after the first upper step: ``steps`` products, and one for λmax."""
        return self.products_cost(self.steps + (self.step_size is None))

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ (H + damping·I)⁻¹ b, without a warm start."""
        return self.advance(matvec, b, {})[0]

    def advance(self, matvec: Matvec, b: Vector, state: State) -> tuple[Solution, State]:
        """The solution of this upper step, and the state for the next one."""
        a, direction, largest = self.step_size, None, 0.0
        if a is None:
            direction, largest = self._curvature(matvec, b, state)
            if largest + self.damping == 0:
                note = "the Hessian is zero along ∂F/∂w"
                return Solution(zeros_like(b), 1.0, 0, note), state
            a = 1 / (largest + self.damping)
        v = cast(Vector, state["v"]) if state else a * b
        k = cast(float, state["k"]) + 1 if state else 1
        before, note = 0 if state else FIRST_STEPS, ""
        for step in range(before + self.steps):
            q = matvec(v).plus(v, self.damping)
            (along,) = to_floats([inner(v, q)])
            if step and not math.isfinite(along):
                raise NonFiniteError(f"v has diverged; make step_size smaller than {a:.3g}")
            if require_finite(along) < [0.0]:
                v, k, note = a * b, 1, "negative curvature along v, which is reset"
                q = matvec(v).plus(v, self.damping)
            r = b - q
            if step == before:
                solution, of_r = v, inner(r, r)
            v = v.plus(r, a if step < before else a / k**self.decay)
        of_v, residual, of_b = to_floats([inner(v, v), of_r, inner(b, b)])
        if not math.isfinite(of_v):
            raise NonFiniteError(f"v has diverged; make step_size smaller than {a:.3g}")
        state = {"v": v, "k": k}
        if direction is not None:
            state |= {"direction": direction.plus(normalised(r), TILT), "largest": largest}
        return Solution(solution, math.sqrt(residual / of_b), before + self.steps, note), state

    def _curvature(self, matvec: Matvec, b: Vector, state: State) -> tuple[Vector, float]:
        """The power iteration's unit vector, and an estimate of |λ|max."""
        direction = cast(Vector, state["direction"]) if state else b
        largest = FORGET * cast(float, state["largest"]) if state else 0.0
        direction, length = power_iteration(matvec, direction, 1 if state else FIRST_STEPS)
        return normalised(direction if length else b), max(largest, length)
