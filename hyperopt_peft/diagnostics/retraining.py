"""A finite-difference hypergradient: the lower level is retrained at perturbed u."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hyperopt_peft.core.optimizer import present_options
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.diagnostics.curvature import random_like
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.products import default_epsilon
from hyperopt_peft.utils.reductions import norm
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.validation import PositiveFloat, PositiveInt
from hyperopt_peft.utils.vector import Vector, dot, widened


@dataclass(frozen=True)
class Coordinates:
    """dF/du along an orthonormal ``basis`` of m vectors, and along K random directions.

    ``slopes`` are ⟨dF/du, q⟩ for each q of ``basis``, then √((n − m)/K)·⟨dF/du, d⟩ for K random d
    orthogonal to the basis, so that ‖slopes‖² is an unbiased estimate of ‖dF/du‖². ``of_epsilon``
    and ``of_length`` are the two errors of `Retraining.slopes`, relative to ‖slopes‖.
    """

    basis: Sequence[Vector]
    slopes: Vector
    of_epsilon: float
    of_length: float

    @property
    def note(self) -> str:
        """The errors, and the share of ‖dF/du‖ outside the span of ``basis``, in words."""
        (slopes,) = self.slopes
        beyond = slopes[len(self.basis) :].norm() / (slopes.norm() or 1.0)
        return (
            f"changes by {self.of_epsilon:.1g} with 2ε, by {self.of_length:.1g} with half of the "
            f"steps; {beyond:.0%} of its norm is outside the span of all estimates"
        )

    def project(self, h: Vector) -> Vector:
        """The coordinates of a vector in the span of ``basis``."""
        (like,) = self.slopes
        entries = [dot(q, h) for q in self.basis]
        return Vector([like.new_tensor(entries + [0.0] * (len(like) - len(entries)))])


@dataclass(frozen=True)
class Retraining(Estimator):
    """dF/du along directions d, from retraining the lower level at perturbed u.

        ⟨dF/du, d⟩ ≈ [F(u + εd, w_K(u + εd)) − F(u − εd, w_K(u − εd))]/2ε

    w_K(u) is the result of K = ``steps`` steps from the current w, by a copy of the lower optimizer
    with its state and clipping, or by gradient descent at rate ``lr``. All evaluations of a level
    have equal batches and dropout masks. The estimate needs no second derivatives and shares no
    code with the estimators, so that it can be their reference in `compare_hypergradients`. For
    small K it is the derivative through K optimizer steps; for large K it tends to the derivative
    through w*(u).

    The implicit term is measured along ``directions`` random orthonormal d (at most the number of
    upper unknowns), and is zero along all others. ``residual`` is the larger of the two relative
    errors of `slopes`. ``epsilon`` is ε, a length in the space of u (`default_epsilon` if None).

    The cost is 4·``directions``·(``steps`` + 2) forward+backward passes.

    Raises:
        ProblemError: an option is out of range, or there is neither ``lr`` nor a lower optimizer.
        NonFiniteError: the retraining diverges.

    Example:
        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> lower.solve()
        >>> h, = hypergradient(upper, lower, Retraining(steps=20, lr=0.4, directions=10))
        >>> h.allclose(hypergradient(upper, lower, "unrolled:steps=20")[0], rtol=1e-3)
        True
    """

    name = "retraining"
    steps: PositiveInt = 20
    directions: PositiveInt = 4
    epsilon: PositiveFloat | None = None
    lr: PositiveFloat | None = None

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError if there is neither ``lr`` nor a lower optimizer."""
        self.require(
            self.lr is not None or lower.optimizer is not None,
            f"{lower.name} has no optimizer to retrain it with; give an lr",
        )

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct = oracle.upper_gradient.direct
        basis = orthonormal(random_directions(direct, self.directions))
        slopes, *errors = self.slopes(oracle, basis)
        implicit = 0.0 * direct
        for d, slope in zip(basis, slopes.tolist(), strict=True):
            implicit = implicit + (slope - dot(direct, d)) * d
        size, error = float(slopes.norm()), max(float(e.norm()) for e in errors)
        return Estimate(direct, implicit, error / size if size else 0.0, self.steps)

    def passes(self, directions: int) -> int:
        """The number of forward+backward passes for the slopes along ``directions`` directions."""
        return 4 * directions * (self.steps + 2)

    def coordinates(self, oracle: Oracle, vectors: Sequence[Vector]) -> Coordinates:
        """dF/du along ``vectors`` and ``directions`` random ones; the oracle is open."""
        unknowns = Vector(oracle.upper.variables)
        basis = orthonormal(vectors)
        rest = orthonormal(random_directions(unknowns, self.directions), basis)
        values, *errors = self.slopes(oracle, [*basis, *rest])
        weight = torch.ones(len(basis) + len(rest), dtype=torch.float64)
        if rest:
            weight[len(basis) :] = ((unknowns.numel() - len(basis)) / len(rest)) ** 0.5
        size = float((weight * values).norm()) or math.inf
        of_epsilon, of_length = (float((weight * e).norm()) / size for e in errors)
        return Coordinates(basis, Vector([weight * values]), of_epsilon, of_length)

    def slopes(self, oracle: Oracle, directions: Sequence[Vector]) -> tuple[Tensor, ...]:
        """⟨dF/du, d⟩ for K unit vectors d, and two error indicators, each ``(K,)``.

        The first error is the change of the slope when ε is doubled: three times the O(ε²) error of
        the central difference, or its rounding error. The second error is the change from half of
        the steps to all steps. It indicates, but does not bound, the error of an incomplete
        training, which may be much larger if convergence is slow. The oracle must be open.
        """
        self.check_levels(oracle.upper, oracle.lower)
        u, w = oracle.upper.variables, oracle.lower.variables
        of_directions = []
        with oracle.moved(), perturbed(u) as here:
            start = tuple(x.detach().clone() for x in w)
            epsilon = self.epsilon or float(
                default_epsilon(here, "central", oracle.lower.differences, beside=start)
            )
            for d in directions:
                quotients = []
                for length in (epsilon, 2 * epsilon):
                    sides = []
                    for signed in (length, -length):
                        assign_(u, here, d.parts, signed)
                        sides.append(self._losses(oracle, start))
                    quotients.append((sides[0] - sides[1]) / (2 * length))
                of_directions.append(torch.stack(quotients))
        (half, full), (_, doubled) = torch.stack(of_directions, -1).unbind()
        return full, (doubled - full).abs(), (full - half).abs()

    def _losses(self, oracle: Oracle, start: Sequence[Tensor]) -> Tensor:
        """F after half of the steps from ``start``, and after all steps, ``(2,)`` in float64."""
        lower = oracle.lower
        assign_(lower.variables, start)
        copies = [x.clone() for x in start]
        optimizer = self._optimizer(lower, copies)
        losses = []
        for step in range(self.steps):
            if step == self.steps // 2:
                losses.append(replace(oracle).upper_gradient.evaluation.loss)
            gradient = oracle.lower_parts()
            size = norm(part for part in gradient if part is not None)
            factor = 1.0 if self.lr else lower.clipping(size)
            for copy, part in zip(copies, gradient, strict=True):
                copy.grad = None if part is None else factor * part
            optimizer.step()
            assign_(lower.variables, copies)
        losses.append(replace(oracle).upper_gradient.evaluation.loss)
        return torch.tensor(losses, dtype=torch.float64)

    def _optimizer(self, lower: Problem, copies: Sequence[Tensor]) -> Optimizer:
        """An optimizer over ``copies``: gradient descent, or a copy of the level's optimizer."""
        if self.lr is not None:
            return torch.optim.SGD(copies, lr=self.lr)
        # accelerate wraps the optimizer
        optimizer: Any = getattr(lower.optimizer, "optimizer", lower.optimizer)
        memo: dict[int, Any] = {id(x): copy for x, copy in zip(lower.variables, copies)}
        twin: Optimizer = deepcopy(optimizer, memo)
        for group, options in zip(twin.param_groups, present_options(lower)):  # functions of u
            group.update(options)
        for state in twin.state.values():
            state.update({k: widened(x) for k, x in state.items() if isinstance(x, Tensor)})
        return twin


def random_directions(like: Vector, count: int) -> list[Vector]:
    """min(``count``, n) random vectors shaped like ``like``."""
    return [random_like(like.parts, seed) for seed in range(min(count, like.numel()))]


def orthonormal(vectors: Iterable[Vector], beyond: Sequence[Vector] = ()) -> list[Vector]:
    """Orthonormal vectors that extend the orthonormal ``beyond`` to the span of ``vectors``.

    The method is Gram–Schmidt, applied twice. It omits a vector with less than 1 % of its norm
    outside the span of the previous ones.
    """
    basis: list[Vector] = []
    for vector in vectors:
        size = vector.norm()
        if not size or not math.isfinite(size):
            continue
        rest = vector / size
        for q in (*beyond, *basis) * 2:
            rest = rest - dot(q, rest) * q
        if (length := rest.norm()) > 1e-2:
            basis.append(rest / length)
    return basis
