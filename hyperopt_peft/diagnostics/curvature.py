"""The lower level's curvature at a point, and what a Newton step from there would change."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from hyperopt_peft.core.chain import anchored, is_chain
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import NEXT, open_oracle
from hyperopt_peft.hypergradients.estimator import Estimate
from hyperopt_peft.hypergradients.implicit.cg import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.hypergradients.implicit.solver import Matvec
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import replay
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.vector import Vector, dot, machine_epsilon, zeros_like

CONDITION = 10.0


@dataclass(frozen=True)
class Spectrum:
    """The smallest and the largest eigenvalue of the lower Hessian H, as Lanczos found them.

    Both are estimates from within: H's own ends lie at or beyond them.

    Example:
        >>> from hyperopt_peft.diagnostics.curvature import Spectrum
        >>> round(Spectrum(-0.11, 0.43).damping(), 3)
        0.17
        >>> Spectrum(-0.11, 0.43).dominated_by(1.0)
        True
    """

    smallest: float
    largest: float

    @property
    def radius(self) -> float:
        """|λ|max, the spectral radius; gradient descent with lr = 1/|λ|max does not diverge."""
        return max(abs(self.smallest), abs(self.largest))

    @property
    def condition(self) -> float:
        """The least condition number that H can have: |λ|max/|λ|min."""
        least = min(abs(self.smallest), abs(self.largest))
        return self.radius / least if least else math.inf

    def damping(self, condition: float = CONDITION) -> float:
        """The least δ ≥ 0 for which H + δI is positive definite with this condition number.

            (λmax + δ)/(λmin + δ) = κ,   δ = max(0, (λmax − κ·λmin)/(κ − 1))

        In units of H: a multiple of f has that multiple of δ. With κ = 10 five steps of CG or
        MINRES leave a residual of some percent, and λmin may be lower than was measured by a
        tenth of the spectrum's width.

        Raises:
            ProblemError: ``condition`` is not above 1.
        """
        if not condition > 1:
            raise ProblemError(f"condition must be above 1, got {condition}")
        return max(0.0, (self.largest - condition * self.smallest) / (condition - 1))

    def dominated_by(self, damping: float) -> bool:
        """Whether δ ≥ |λ|max, so that (H + δI)⁻¹ is little else than I/δ."""
        return damping > 0 and damping >= self.radius


@dataclass(frozen=True)
class Curvature(Spectrum):
    """The second order of a lower level at one point.

    ``residual`` is that of an undamped MINRES solve for the hypergradient, ‖b − Hv‖/‖b‖;
    ``change`` is how far a Newton step of the lower level moves the hypergradient, relative to
    ‖direct‖ + ‖implicit‖, and ``losses`` are f before and after that step. ``implicit`` says
    whether the implicit term is other than zero at either point. ``xi`` is the ξ of ``darts``
    with the implicit term closest to that of a solve with H + damping·I:
    ξ = ⟨d, r⟩/⟨d, d⟩, where d is the implicit term of ``darts`` at ξ = 1 and r that of the solve.
    """

    implicit: bool
    losses: tuple[float, float]
    change: float
    residual: float
    implicit_ratio: float
    xi: float

    def __str__(self) -> str:
        return (
            f"eigenvalues of the lower Hessian from {self.smallest:.2g} to {self.largest:.2g} at "
            f"least, damping {self.damping():.2g} for a condition number of {CONDITION:g}; "
            f"residual {self.residual:.1g}; implicit/direct {self.implicit_ratio:.2g}; ξ of "
            f"darts {self.xi:.2g}; a Newton step of the lower level changes f from "
            f"{self.losses[0]:.4g} to {self.losses[1]:.4g} and the hypergradient by "
            f"{self.change:.1%}"
        )


def spectrum(
    upper: Problem,
    lower: Problem,
    *,
    upper_batch: Any = NEXT,
    lower_batch: Any = NEXT,
    seed: int = 0,
    steps: int = 10,
) -> Spectrum:
    """The ends of the lower Hessian's spectrum at the current point, by ``steps`` products.

    Nothing is changed. Products are exact where f has a second derivative, else differences.

    Args:
        upper_batch, lower_batch: as for `hypergradient`.
        seed: of dropout and of the vector that Lanczos starts from.
        steps: of Lanczos; the ends move outwards as they grow.

    Raises:
        ProblemError: ``steps`` is not positive, or the levels share a tensor.
        NonFiniteError: f or a product is NaN or infinite.

    Example:
        >>> import torch
        >>> from hyperopt_peft.diagnostics.curvature import spectrum
        >>> from hyperopt_peft.problems.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> spectrum(upper, lower).smallest > 0  # ridge regression is strictly convex
        True
    """
    oracle = open_oracle(upper, lower, upper_batch=upper_batch, lower_batch=lower_batch, seed=seed)
    with oracle.open():
        if not is_chain(lower):
            with suppress(ProblemError):  # f has no second derivative
                return _ends(oracle, "exact", steps, seed)
        return _ends(oracle, "difference", steps, seed)


def _ends(oracle: Oracle, product: ProductKind, steps: int, seed: int) -> Spectrum:
    with oracle.product(product) as second:
        return lanczos(second.hessian, random_like(oracle.lower.variables, seed), steps)


def random_like(variables: Any, seed: int) -> Vector:
    """A vector of the shape of ``variables`` with standard normal entries."""
    zero = Vector.of([None] * len(variables), variables)
    entries = torch.randn(zero.numel(), generator=torch.Generator().manual_seed(seed))
    return zero.with_entries(entries.to(zero.flat()))


def measure(oracle: Oracle, product: ProductKind, steps: int, seed: int) -> Curvature:
    """The curvature at the oracle's point, by 5·``steps`` products at most.

    The oracle is open. The lower variables move; whoever calls puts them back.

    Raises:
        ProblemError: exact products, and f has no second derivative.
        NonFiniteError: f, F, or a product is NaN or infinite.
    """
    w = oracle.lower.variables
    gradient = oracle.lower_gradient()
    with oracle.product(product) as second:
        ends = lanczos(second.hessian, random_like(w, seed), steps)
        newton = gradient
        if gradient.norm() > 0:
            newton = ConjugateGradient(steps=steps).solve(second.hessian, gradient).v
    if newton.norm() == 0:  # negative curvature along the gradient itself
        newton = gradient / (max(-ends.smallest, ends.largest) or 1.0)
    here = _hypergradient(oracle, MINRES(steps=steps, product=product))
    xi = _xi(oracle, product, ends.damping(), steps)
    with perturbed(w) as start, anchored(oracle.lower):
        before = after = _loss(oracle)
        for halvings in range(10):
            assign_(w, start, newton.parts, -(0.5**halvings))
            torch.clear_autocast_cache()  # it holds half-precision copies of where w was
            after = _loss(oracle)
            if after < before:
                there = _hypergradient(oracle, MINRES(steps=steps, product=product))
                break
        else:  # no step is short enough: this is a minimum, to rounding
            after, there = before, here
    torch.clear_autocast_cache()
    size = max(e.direct.norm() + e.implicit.norm() for e in (here, there))
    moved = (there.hypergradient - here.hypergradient).norm()
    return Curvature(
        ends.smallest,
        ends.largest,
        here.implicit.norm() + there.implicit.norm() > 0,
        (before, after),
        moved / size if size else 0.0,
        here.residual or 0.0,
        here.implicit_ratio,
        xi,
    )


def lanczos(matvec: Matvec, start: Vector, steps: int) -> Spectrum:
    """The extreme eigenvalues of a symmetric matrix, as ``steps`` products from ``start`` see them.

    They are those of the tridiagonal form of the matrix in the Krylov space of ``start``, and
    so lie inside its spectrum. Lanczos 1950, doi:10.6028/jres.045.026.

    Raises:
        ProblemError: ``steps`` is not positive.
        NonFiniteError: a product is NaN or infinite.
    """
    if steps < 1:
        raise ProblemError(f"steps must be at least 1, got {steps}")
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
    upper = torch.diag(torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64), 1)
    form = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + upper + upper.T
    values = torch.linalg.eigvalsh(form)
    return Spectrum(float(values[0]), float(values[-1]))


def _hypergradient(oracle: Oracle, solver: MINRES) -> Estimate:
    """At the point where the lower variables are now, at fixed options of the lower optimizer."""
    result = solver.estimate(replace(oracle))
    if not result.hypergradient.isfinite():
        raise NonFiniteError("the hypergradient is not finite")
    return result


def _xi(oracle: Oracle, product: ProductKind, damping: float, steps: int) -> float:
    """ξ = ⟨d, r⟩/⟨d, d⟩, see `Curvature`; 0 where ``darts`` has no implicit term."""
    b = oracle.upper_gradient.b
    if b.norm() == 0:
        return 0.0
    solver = MINRES(steps=steps, damping=damping, tolerance=1e-2)
    with oracle.product(product) as second:
        d = second.mixed(b)
        r = second.mixed(solver.solve(second.hessian, b).v)
    square = dot(d, d)
    return dot(d, r) / square if square else 0.0


def _loss(oracle: Oracle) -> float:
    """f where the lower variables are now, finite or not."""
    lower, batch = oracle.lower, oracle.lower_batch
    with replay(oracle.lower_random):
        if is_chain(lower):  # the levels below follow in its gradient alone
            with suppress(NonFiniteError):
                return lower.gradient(batch, lower.variables).loss
            return math.inf
        loss, _ = lower.evaluate(batch)
    oracle.buffers.restore()
    return float(distributed.average(loss.detach()))
