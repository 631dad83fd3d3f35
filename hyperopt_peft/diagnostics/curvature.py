"""The curvature of the lower level at a point, and the effect of a Newton step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import NEXT, open_oracle
from hyperopt_peft.hypergradients.implicit.cg import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.hypergradients.implicit.solver import Matvec
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.utils.random_state import replay
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.validation import require_count
from hyperopt_peft.utils.vector import Vector, dot, machine_epsilon, zeros_like

CONDITION = 10.0  # the condition number that `Spectrum.damping` achieves


@dataclass(frozen=True)
class Spectrum:
    """Lanczos estimates of the smallest and the largest eigenvalue of the lower Hessian H.

    Both lie within the spectrum of H.
    """

    smallest: float
    largest: float

    def damping(self) -> float:
        """The least δ ≥ 0 for which H + δI is positive definite with condition number κ = 10.

            (λmax + δ)/(λmin + δ) = κ,   δ = max(0, (λmax − κ·λmin)/(κ − 1))

        δ has the units of H. With this δ, five steps of CG or MINRES leave a residual of a few
        percent, and H + δI is positive definite even if the true λmin is lower by a tenth of
        λmax − λmin.
        """
        return max(0.0, (self.largest - CONDITION * self.smallest) / (CONDITION - 1))


@dataclass(frozen=True)
class Curvature(Spectrum):
    """The lower curvature at one point, and the effect of a Newton step of the lower level."""

    implicit: bool  # whether the implicit term is nonzero, before or after the Newton step
    losses: tuple[float, float]  # f before and after the Newton step
    change: float  # of the hypergradient by the Newton step, over ‖direct‖ + ‖implicit‖
    residual: float  # ‖b − Hv‖/‖b‖ of an undamped MINRES solve
    implicit_ratio: float  # ‖implicit‖/‖direct‖
    remainder: float  # ‖direct + implicit‖/‖direct‖, NaN without a direct term

    def __str__(self) -> str:
        return (
            f"eigenvalues of the lower Hessian at least from {self.smallest:.2g} to "
            f"{self.largest:.2g}; damping {self.damping():.2g} for condition number {CONDITION:g}; "
            f"residual {self.residual:.1g}; implicit/direct {self.implicit_ratio:.2g}; a Newton "
            f"step of the lower level changes f from {self.losses[0]:.4g} to {self.losses[1]:.4g} "
            f"and the hypergradient by {self.change:.1%}"
        )


def spectrum(
    upper: Problem,
    lower: Problem,
    *,
    upper_batch: object = NEXT,
    lower_batch: object = NEXT,
    seed: int = 0,
    lanczos_steps: int = 10,
) -> Spectrum:
    """The extreme eigenvalues of the lower Hessian at the current point; restores all state.

    Products are exact if f has a second derivative, and differences otherwise.

    Args:
        upper_batch, lower_batch: as in `hypergradient`.
        seed: the seed of dropout and of the initial Lanczos vector.
        lanczos_steps: the number of Lanczos steps; each costs one product.

    Raises:
        ProblemError: ``lanczos_steps`` is not positive, or the levels share a tensor.
        NonFiniteError: f or a product is NaN or infinite.

    Example:
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> spectrum(upper, lower).smallest > 0  # ridge regression is strictly convex
        True
    """
    require_count("lanczos_steps", lanczos_steps, least=1)
    oracle = open_oracle(upper, lower, upper_batch=upper_batch, lower_batch=lower_batch, seed=seed)
    start = random_like(lower.variables, seed)
    with oracle.open():
        with suppress(ProblemError), oracle.product("exact") as product:  # there may be none
            return lanczos(product.hessian, start, lanczos_steps)
        with oracle.product("difference") as product:
            return lanczos(product.hessian, start, lanczos_steps)


def random_like(variables: Sequence[Tensor], seed: int) -> Vector:
    """A vector shaped like ``variables`` with standard normal entries."""
    zero = Vector.of([None] * len(variables), variables)
    entries = torch.randn(zero.numel(), generator=torch.Generator().manual_seed(seed))
    return zero.with_entries(entries.to(zero.flat()))


def measure_curvature(oracle: Oracle, product: ProductKind, steps: int, seed: int) -> Curvature:
    """The curvature at an open oracle's point, by 5·``steps`` products; the caller restores w."""
    w = oracle.lower.variables
    gradient = oracle.lower_gradient()
    with oracle.product(product) as second:
        ends = lanczos(second.hessian, random_like(w, seed), steps)
        newton = gradient
        if gradient.norm() > 0:
            newton = ConjugateGradient(steps=steps).solve(second.hessian, gradient).v
    if newton.norm() == 0:  # negative curvature along the gradient itself
        newton = gradient / (max(-ends.smallest, ends.largest) or 1.0)
    solver = MINRES(steps=steps, product=product)
    here = replace(oracle).estimate(solver)
    with perturbed(w) as start, oracle.lower.anchored():
        before = after = _loss(oracle)
        for halvings in range(10):
            assign_(w, start, newton.parts, -(0.5**halvings))
            torch.clear_autocast_cache()  # it has half-precision copies of the previous w
            after = _loss(oracle)
            if after < before:
                there = replace(oracle).estimate(solver)
                break
        else:  # no step decreases f: this is a minimum, up to rounding
            after, there = before, here
    torch.clear_autocast_cache()
    (norm, direct, implicit), (_, *terms) = here.norms, there.norms
    size = max(direct + implicit, sum(terms))
    moved = (there.hypergradient - here.hypergradient).norm()
    return Curvature(
        ends.smallest,
        ends.largest,
        implicit + terms[1] > 0,
        (before, after),
        moved / size if size else 0.0,
        here.residual or 0.0,
        here.implicit_ratio,
        norm / (direct or math.nan),
    )


def lanczos(matvec: Matvec, start: Vector, steps: int) -> Spectrum:
    """Estimates of the extreme eigenvalues of a symmetric matrix, within its spectrum.

    They are the extreme eigenvalues of the tridiagonal matrix from ``steps`` Lanczos steps that
    begin at ``start``. Lanczos 1950, doi:10.6028/jres.045.026.
    """
    q, previous, beta = start / start.norm(), zeros_like(start), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        product = matvec(q)
        if not product.isfinite():
            raise NonFiniteError("a Hessian-vector product is not finite")
        diagonal.append(dot(q, product))
        rest = product - diagonal[-1] * q - beta * previous
        beta = rest.norm()
        if beta <= 10 * machine_epsilon(start) * product.norm():  # the space is invariant
            break
        beside.append(beta)
        q, previous = rest / beta, q
    values = eigvalsh_tridiagonal(diagonal, beside[: len(diagonal) - 1])
    return Spectrum(float(values[0]), float(values[-1]))


def _loss(oracle: Oracle) -> float:
    """f at the current w, finite or not."""
    lower = oracle.lower
    with replay(oracle.lower_random), suppress(NonFiniteError):
        loss, _, _ = lower.differentiate(oracle.lower_batch, lower.variables)
        oracle.buffers.restore()
        return float(loss)
    return math.inf
