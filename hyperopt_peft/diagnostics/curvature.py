"""The lower level's curvature at a point, and what a Newton step from there would change."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from scipy.linalg import eigvalsh_tridiagonal

from hyperopt_peft.core.chain import anchored, is_chain
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimator import Estimate
from hyperopt_peft.hypergradients.implicit.cg import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.minres import MINRES
from hyperopt_peft.hypergradients.implicit.solver import Matvec
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import replay
from hyperopt_peft.utils.restore import assign, displaced
from hyperopt_peft.utils.vector import Vector, dot


@dataclass(frozen=True)
class Curvature:
    """The second order of a lower level at one point.

    ``smallest`` and ``largest`` eigenvalue of H are estimates from within; ``residual`` is that of
    a MINRES solve for the hypergradient, ‖b − Hv‖/‖b‖; ``change`` is how far a Newton step below
    moves the hypergradient, relative to ‖direct‖ + ‖implicit‖, and ``losses`` are f before and
    after that step. ``implicit`` says whether the implicit term is other than zero at either point.
    """

    smallest: float
    largest: float
    implicit: bool
    losses: tuple[float, float]
    change: float
    residual: float
    implicit_ratio: float

    @property
    def condition(self) -> float:
        """The least condition number that H can have: |λ|max/|λ|min."""
        ends = abs(self.smallest), abs(self.largest)
        return max(ends) / min(ends) if min(ends) else math.inf

    def __str__(self) -> str:
        return (
            f"eigenvalues of the lower Hessian from {self.smallest:.2g} to {self.largest:.2g} at "
            f"least; residual {self.residual:.1g}; implicit/direct {self.implicit_ratio:.2g}; a "
            f"Newton step below changes f from {self.losses[0]:.4g} to {self.losses[1]:.4g} and "
            f"the hypergradient by {self.change:.1%}"
        )


def measure(oracle: Oracle, product: ProductKind, steps: int, seed: int) -> Curvature:
    """The curvature at the oracle's point, by 4·``steps`` products at most.

    The oracle is open. The lower variables move; whoever calls puts them back.

    Raises:
        ProblemError: exact products, and f has no second derivative.
        NonFiniteError: f, F, or a product is NaN or infinite.
    """
    w = oracle.lower.variables
    gradient = oracle.lower_gradient()
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(gradient.numel(), generator=generator)
    some = gradient.with_entries(flat.to(gradient.flat()))
    with oracle.product(product) as second:
        spectrum = Spectrum(second.hessian)
        MINRES(steps=steps).solve(spectrum, some)
        newton = gradient
        if gradient.norm() > 0:
            newton = ConjugateGradient(steps=steps).solve(second.hessian, gradient).v
    smallest, largest = spectrum.ends()
    if newton.norm() == 0:  # negative curvature along the gradient itself
        newton = gradient / (max(-smallest, largest) or 1.0)
    here = _hypergradient(oracle, product, steps)
    with displaced(w) as start, anchored(oracle.lower):
        before = after = _loss(oracle)
        for halvings in range(10):
            assign(w, start, newton.parts, -(0.5**halvings))
            torch.clear_autocast_cache()  # it holds half-precision copies of where w was
            after = _loss(oracle)
            if after < before:
                there = _hypergradient(oracle, product, steps)
                break
        else:  # no step is short enough: this is a minimum, to rounding
            after, there = before, here
    torch.clear_autocast_cache()
    size = max(e.direct.norm() + e.implicit.norm() for e in (here, there))
    moved = (there.hypergradient - here.hypergradient).norm()
    return Curvature(
        smallest,
        largest,
        here.implicit.norm() + there.implicit.norm() > 0,
        (before, after),
        moved / size if size else 0.0,
        here.residual or 0.0,
        here.implicit_ratio,
    )


@dataclass
class Spectrum:
    """The extreme eigenvalues of a symmetric matrix, as a by-product of MINRES.

    MINRES multiplies by the orthonormal vectors of Lanczos; their products with the matrix hold its
    tridiagonal form, whose eigenvalues lie inside the matrix's own.
    """

    matvec: Matvec
    diagonal: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    _last: Vector | None = None

    def __call__(self, q: Vector) -> Vector:
        """The product with ``q``.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        product = self.matvec(q)
        if not product.isfinite():
            raise NonFiniteError("a Hessian-vector product is not finite")
        if self._last is not None:
            self.beside.append(dot(q, self._last))
        self.diagonal.append(dot(q, product))
        self._last = product
        return product

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue that were met."""
        values = eigvalsh_tridiagonal(self.diagonal, self.beside)
        return float(values[0]), float(values[-1])


def _hypergradient(oracle: Oracle, product: ProductKind, steps: int) -> Estimate:
    """At the point where the lower variables are now, at fixed options of the lower optimizer."""
    result = MINRES(steps=steps, product=product).estimate(replace(oracle))
    if not result.hypergradient.isfinite():
        raise NonFiniteError("the hypergradient is not finite")
    return result


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
