"""Gradients and second-derivative products of two levels at the current point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from hyperopt_peft.core.problem import LossGradient, Problem, StepRecord, devices_of, variables_of
from hyperopt_peft.core.validation import NO_WRITES, rewritten, unwritten
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.dots import Dots
from hyperopt_peft.hypergradients.products import (
    NO_EXACT_PRODUCT,
    SHARDED,
    DifferenceProduct,
    ExactProduct,
    Objective,
    Passes,
    Product,
    ProductKind,
    Scheme,
)
from hyperopt_peft.utils.autograd import HALF, uncompiled
from hyperopt_peft.utils.distributed import is_sharded
from hyperopt_peft.utils.models import require_no_rounding
from hyperopt_peft.utils.precision import autocast_devices, single_precision
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.restore import Buffers, TensorPool, assign_, perturbed, preserve_state
from hyperopt_peft.utils.vector import Vector, inner

if TYPE_CHECKING:
    from hyperopt_peft.hypergradients.estimator import Estimator

#: An estimator's state between two upper steps: vectors shaped like w, and numbers.
State = Mapping[str, Vector | float]
#: (∂/∂u, ∂/∂w) of a level's loss at w + offset.
MovedGradients = Callable[[Literal["upper", "lower"], Vector], tuple[Vector, Vector]]


@dataclass(frozen=True)
class UpperGradient:
    """∂F/∂u (``direct``), ∂F/∂w (``b``) and ``norm`` = ‖b‖₂; zero for variables F does not read.

    ``norm`` is also 0 if its square underflows in float64.
    """

    direct: Vector
    b: Vector
    norm: float
    evaluation: LossGradient


@dataclass(frozen=True)
class Estimate:
    """A hypergradient dF/du = ``direct`` + ``implicit``, and a report of the computation.

    Attributes:
        direct: ∂F/∂u, shaped like the upper variables.
        implicit: the implicit term with its minus sign, in the same shapes.
        residual: ‖b − Hv‖/‖b‖ of the solve; None if the estimator does not measure it.
        steps: the number of steps of the solver.
        note: a message for the user.
        state: the `Oracle.state` of the next upper step.
        norms: the 2-norms of dF/du, ``direct`` and ``implicit``; set by `Oracle.estimate`,
            NaN before.

    Example:
        >>> from torch import ones
        >>> x = Vector([ones(2)])
        >>> Estimate(direct=x, implicit=-0.5 * x).hypergradient.parts
        (tensor([0.5000, 0.5000]),)
    """

    direct: Vector
    implicit: Vector
    residual: float | None = None
    steps: int | None = None
    note: str = ""
    state: State = field(default_factory=dict)
    norms: tuple[float, float, float] = (math.nan, math.nan, math.nan)

    @property
    def hypergradient(self) -> Vector:
        """dF/du = direct + implicit, shaped like the upper variables."""
        return self.direct + self.implicit

    @property
    def implicit_ratio(self) -> float:
        """‖implicit‖/‖direct‖; infinite if only ``direct`` is zero."""
        _, direct, implicit = self.norms
        return implicit / direct if direct else (float("inf") if implicit else 0.0)


@dataclass
class Oracle:
    """First and second derivatives of F and f, for fixed batches and random numbers.

    Attributes:
        upper, lower: the levels with losses F and f.
        upper_batch, lower_batch: the batches of F and f.
        upper_random, lower_random: the generator states at the start of each evaluation of F and
            f, so that all evaluations of a loss have equal dropout masks.
        history: the last lower steps, oldest first; empty outside training.
        copies: the memory for copies of the lower variables.
        state: the `Estimate.state` of the last upper step; empty at first, and outside training.
        passes: the number of passes so far.
        buffers: the modules' buffers, restored after each evaluation.
        losses: the values of f so far, on their device.
        dots: the dot products from the lower step's own pass, if `Estimator.observe` requested any.
        implicit: whether `upper_gradient` has ∂F/∂w; without, its ``b`` has no tensors.

    Example:
        >>> from hyperopt_peft.hypergradients import open_oracle
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> oracle = open_oracle(*diabetes())
        >>> with oracle.open(), oracle.product("exact") as product:
        ...     product.mixed(oracle.upper_gradient.b).numel()
        10
    """

    upper: Problem
    lower: Problem
    upper_batch: Any
    lower_batch: Any
    upper_random: RandomState
    lower_random: RandomState
    history: Sequence[StepRecord] = ()
    copies: TensorPool | None = None
    state: State = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)
    buffers: Buffers = field(default_factory=Buffers)
    losses: list[Tensor] = field(default_factory=list)
    dots: Dots | None = None
    implicit: bool = True

    @property
    def last(self) -> StepRecord | None:
        """The last lower step; None outside training."""
        return self.history[-1] if self.history else None

    @contextmanager
    def open(self) -> Iterator[Oracle]:
        """Make the oracle usable in the body, and restore all state afterwards.

        Raises:
            ProblemError: outside training, a loss changed a variable.
        """
        variables = (*self.upper.variables, *self.lower.variables)
        devices = devices_of(self.upper, self.lower)
        with uncompiled(), preserve_state(variables, devices) as self.buffers:
            if self.copies is not None:  # in training a copy would take too long
                yield self
                return
            with perturbed(variables) as before:
                yield self
                if names := rewritten((self.upper, self.lower), before):
                    raise ProblemError(f"a loss writes to {names[0]}; {NO_WRITES}")

    def estimate(self, estimator: Estimator) -> Estimate:
        """The estimate of an `Estimator` at the oracle's point; restores all state afterwards.

        Raises:
            NonFiniteError: a loss, a gradient, a curvature or the result is NaN or infinite.
        """
        name = estimator.name
        try:
            with self.open():
                result = estimator.estimate(self)
        except NonFiniteError as error:
            # A loss that is not finite is the cause, and makes the better message.
            self._require_finite(name, to_floats(self.losses))
            raise NonFiniteError(f"{name}: {error}") from error
        vectors = result.hypergradient, result.direct, result.implicit
        values = to_floats([*self.losses, *(inner(x, x) for x in vectors)])
        self._require_finite(name, values[:-3])
        if not math.isfinite(sum(values[-3:])) and not result.hypergradient.isfinite():
            raise NonFiniteError(
                f"{name}: the hypergradient is not finite (residual {result.residual})"
            )
        norm, direct, implicit = map(math.sqrt, values[-3:])
        return replace(result, norms=(norm, direct, implicit))

    def _require_finite(self, estimator: str, losses: Sequence[float]) -> None:
        """Raise NonFiniteError if a value of f in ``losses`` is NaN or infinite."""
        for loss in losses:
            if not math.isfinite(loss):
                raise NonFiniteError(f"{estimator}: {self.lower.name}: the loss is {loss}")

    @cached_property
    def upper_gradient(self) -> UpperGradient:
        """∂F/∂u and ∂F/∂w, by one forward+backward pass."""
        self.passes.count(gradients=1)
        u, w = self.upper.variables, self.lower.variables if self.implicit else ()
        with replay(self.upper_random), unwritten(self.upper, self.lower):
            evaluation = self.lower.gradient_above(self.upper, self.upper_batch, (*u, *w))
        self.buffers.restore()
        gradient, norm = evaluation.gradient, math.hypot(*evaluation.norms[len(u) :])
        if norm**2 == 0:  # solvers divide by it
            norm = 0.0
        direct, b = Vector.of(gradient[: len(u)], u), Vector.of(gradient[len(u) :], w)
        views = (None if g is None else x for g, x in zip(gradient, (*direct, *b), strict=True))
        evaluation = replace(evaluation, gradient=tuple(views))  # frees the first copy
        return UpperGradient(direct, b, norm, evaluation)

    def lower_gradient(self) -> Vector:
        """∂f/∂w at the current w, by one forward+backward pass."""
        return Vector.of(self.differentiate_lower(), self.lower.variables)

    def differentiate_lower(self) -> tuple[Tensor | None, ...]:
        """As ``lower_gradient``, with None for a variable that f does not read."""
        gradient = self._objective(None).differentiate(self.lower.variables)
        self.lower.require_finite(self.losses[-1], gradient)
        return gradient

    @contextmanager
    def moved(self) -> Iterator[MovedGradients]:
        """A function for the gradients of either loss at w + offset, by one forward+backward pass.

        The passes run in float32 or wider, for use in differences. Afterwards w is restored bit for
        bit.
        """
        objective, u = self._objective(None), self.upper.variables
        w = self.lower.variables
        half = self._half(objective) or bool(self.upper.evaluated.half)
        with ExitStack() as stack:
            stack.enter_context(self._differentiable())
            stack.enter_context(self._single_precision(half))
            point = stack.enter_context(perturbed(w, None if half else self.copies))
            stack.enter_context(self.lower.anchored())

            def gradients(
                level: Literal["upper", "lower"], offset: Vector
            ) -> tuple[Vector, Vector]:
                assign_(w, point, offset.parts, 1.0)
                if level == "upper":
                    above = replace(self).upper_gradient
                    return above.direct, above.b
                both = objective.gradient((*u, *w)).parts
                return Vector(both[: len(u)]), Vector(both[len(u) :])

            yield gradients

    @contextmanager
    def product(
        self,
        kind: ProductKind,
        *,
        at: StepRecord | None = None,
        epsilon: float | None = None,
        scheme: Scheme = "central",
    ) -> Iterator[Product]:
        """Second-derivative products of f at the current point, or at the start of step ``at``.

        A forward difference uses ``at.upper_gradient`` if it is recorded.
        """
        if kind == "exact":
            if is_sharded(*variables_of(self.upper, self.lower)):
                raise ProblemError(SHARDED)
            self.lower.require_single(NO_EXACT_PRODUCT)
        objective = self._objective(at)
        half, upper_gradient = self._half(objective), None
        if at is not None and at.upper_gradient is not None and not half:
            upper_gradient = Vector.of(at.upper_gradient, self.upper.variables)
        variables = self.lower.variables
        with ExitStack() as stack:
            stack.callback(self.buffers.restore)  # after the body, since its graph reads them
            if kind == "difference":
                stack.enter_context(self._differentiable())
            stack.enter_context(self._single_precision(half))
            point: Sequence[Tensor] = ()
            if at is not None or kind == "difference":
                copies = None if half else self.copies  # half: the variables are float32 here
                point = stack.enter_context(perturbed(variables, copies))
            if at is not None:
                point = at.variables
                assign_(variables, point)
            if kind == "difference":
                stack.enter_context(self.lower.anchored())
                yield DifferenceProduct(objective, point, epsilon, scheme, upper_gradient)
            else:
                yield ExactProduct(objective)

    def observe(self, dots: Dots, at: StepRecord | None = None) -> Dots:
        """Fill ``dots`` by one forward+backward pass of f, in the precision of training.

        The pass is at the current w, or at the start of step ``at``.
        """
        objective, w = self._objective(at), self.lower.variables
        with nullcontext() if at is None else perturbed(w, self.copies), dots.observe():
            if at is not None:
                assign_(w, at.variables)
            gradient = objective.differentiate(w)
        dots.check(gradient)
        return dots

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Raise ProblemError if a layer of F, or of f in the body, rounds activations."""
        require_no_rounding(self.buffers.modules)
        yield
        require_no_rounding(self.buffers.modules)

    @contextmanager
    def _single_precision(self, half: bool) -> Iterator[None]:
        """Within the body, passes run in float32 if ``half``."""
        variables = variables_of(self.upper, self.lower)
        if half and is_sharded(*variables):
            raise ProblemError(
                "a difference of gradients needs float32, which sharded variables do not support "
                "when the loss runs in half precision; turn mixed precision off"
            )
        with single_precision(variables) if half else nullcontext():
            yield

    def _half(self, objective: Objective) -> bool:
        """Whether f or its variables are in half precision."""
        if autocast_devices():
            return True
        if self.lower.evaluated.half is None:  # f has never been evaluated
            # The reducers of DDP and FSDP2 expect a backward pass after a forward pass.
            with objective.evaluation():
                self.lower.gradient(objective.batch, (*self.upper.variables, *self.lower.variables))
            self.buffers.restore()
        half = any(variable.dtype in HALF for variable in variables_of(self.upper, self.lower))
        return half or any(level.evaluated.half for level in self.lower.levels)

    def _objective(self, at: StepRecord | None) -> Objective:
        batch = self.lower_batch if at is None else at.batch
        random_state = self.lower_random if at is None else at.random_state
        return Objective(
            self.lower, self.upper, batch, random_state, self.passes, self.buffers, self.losses
        )
