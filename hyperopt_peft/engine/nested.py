"""Three or more levels.

    min_u F(u, v*, w*),   v*(u) = argmin_v G(u, v, w*(u, v)),   w*(u, v) = argmin_w f(u, v, w)

is ``Engine(top, Nested(middle, lower), "cg:product=difference")``. Four levels are
``Engine(first, Nested(second, Nested(third, fourth)), "cg:product=difference")``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import LossGradient, Problem, StepRecord, devices_of
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import check_ownership, like
from hyperopt_peft.hypergradients.implicit.cg import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.solver import Solver
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.hypergradients.registry import EstimatorLike, get_estimator
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.validation import require_count, require_settings
from hyperopt_peft.utils.vector import Vector


class Nested(Problem):
    """G̃(u, v) = G(u, v, w*(u, v)),  w*(u, v) = argmin over w of f(u, v, w).

    The level owns v. Its ``gradient`` is a total derivative; with x a variable of u or v:

        ∂G̃/∂x = ∂G/∂x − ∂²f/∂x∂w · [∂²f/∂w²]⁻¹ · ∂G/∂w

    The estimator of the next higher level must have ``product="difference"``, since second
    derivatives of G̃ are differences of this gradient. `gradient_above` is the total derivative of
    F, which may read w too.

    When a difference perturbs v, a Newton step on f moves w to w*; afterwards w is restored bit for
    bit:

        w ← w − [∂²f/∂w²]⁻¹ (∂f/∂w − g),   g = ∂f/∂w before the perturbation

    Subtracting g treats the current w as w*. The step is exact for a quadratic f; for any other f
    its error has the order of the finite difference's own. If the estimator is not a solver
    (darts), w does not move, and ∂²G̃ lacks the term with ∂w*/∂v.

    Derivatives of f use the batch and the random numbers of the last lower step; before the first
    step, the next batch. The records of `Engine` have ``lower_below_loss`` and
    ``lower_below_grad_norm`` of the lower level, and ``lower_residual`` and ``upper_residual`` of
    the solves for G̃ and F.

    Args:
        middle: the level with loss G; this level takes over its variables v, optimizer and data.
        lower: the level with loss f; a `Nested` level if there are four or more levels.
        hypergradient: the estimator of ∂G̃/∂x. A finite difference divides the error of a solve by
            a small step, so a solver needs a fixed number of steps or a small ``tolerance``. The
            default is CG with 20 steps and tolerance 1e-12.
        lower_steps: the number of steps of ``lower`` before each step of ``middle``.
        warmup_steps: the number of additional steps of ``lower`` before the first step.

    Raises:
        ProblemError: two variables share memory; ``middle`` is a `Nested` level; the estimator
            cannot be used here; or, at the first step, no loss reads a variable of ``lower``.

    Example:
        >>> from hyperopt_peft import Engine
        >>> class Level(Problem):
        ...     def __init__(self, variable, function):
        ...         self.function = function
        ...         super().__init__([variable], optimizer=torch.optim.SGD([variable], lr=0.2))
        ...
        ...     def loss(self, batch):
        ...         return self.function()
        >>> u, v, w = (torch.zeros((), requires_grad=True) for _ in range(3))
        >>> top = Level(u, lambda: (v - 1) ** 2)  # v* = 1 where u = 2
        >>> middle = Level(v, lambda: (v + w - u) ** 2)  # v* = u/2, since w* = v
        >>> lower = Level(w, lambda: (w - v) ** 2)  # w* = v
        >>> engine = Engine(top, Nested(middle, lower), "cg:product=difference", progress=False)
        >>> history = engine.run(40)
        >>> round(u.item(), 1)
        2.0
    """

    def __init__(
        self,
        middle: Problem,
        lower: Problem,
        hypergradient: EstimatorLike | None = None,
        *,
        lower_steps: int = 1,
        warmup_steps: int = 0,
    ) -> None:
        check_ownership(middle, lower)
        vars(self).update(vars(middle))  # variables, data, optimizer and all that a loss may read
        self.middle, self.lower = middle, lower
        require_count("lower_steps", lower_steps, least=1)
        require_count("warmup_steps", warmup_steps, least=0)
        self.lower_steps, self.warmup_steps = lower_steps, warmup_steps
        product: ProductKind = "difference" if lower.nested else "exact"
        default = ConjugateGradient(steps=20, tolerance=1e-12, product=product)
        self.estimator = get_estimator(hypergradient or default)
        self._step = BilevelStep(middle, lower, self.estimator)
        self._rounds = 0  # how often the lower level has been trained
        self._log: dict[str, float] = {}  # of the last lower step
        self._anchor: Vector | None = None  # g within `anchored`
        self._read: dict[Tensor, bool] = {}  # whether the lower level reads a variable

    @property
    def levels(self) -> tuple[Problem, ...]:
        """This level, then its lower levels, from top to bottom."""
        return (self, *self.lower.levels)

    @property
    def differences(self) -> int:
        """How deeply finite differences nest in ``gradient``: 2 for a difference of differences."""
        exact = self.estimator.requirements.second_derivatives
        return self.lower.differences + (not (exact or isinstance(self.estimator, Direct)))

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """G at the current w."""
        return self.middle.loss(batch)

    def next_batch(self) -> Any:
        """The next batch of ``middle``, after ``lower_steps`` steps of the lower level.

        Raises:
            ProblemError: at the first step, no loss reads a variable of the lower level.
            NonFiniteError: a loss or a gradient of the lower level is NaN or infinite.
        """
        for _ in range(self.lower_steps + (0 if self._rounds else self.warmup_steps)):
            loss, norm, metrics = self._step.train_lower()
        self._rounds += 1
        log = {"loss": loss, "grad_norm": norm, **metrics}
        self._log = {f"below_{key}": value for key, value in log.items()}
        return self.middle.next_batch()

    def step(self, gradient: Sequence[Tensor | None], norm: float | None = None) -> float:
        """A step of ``middle``."""
        return self.middle.step(gradient, norm)

    def differentiate(
        self, batch: object, variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        """G and ∂G̃/∂variables; None for a variable that neither G nor a lower loss reads.

        Raises:
            NonFiniteError: a loss, a gradient or a curvature is NaN or infinite.
        """
        evaluation = self.gradient_above(self.middle, batch, variables)
        loss = torch.tensor(evaluation.loss, dtype=torch.float64)
        return loss, evaluation.metrics | self._log, evaluation.gradient

    def gradient_above(
        self, upper: Problem, batch: object, variables: Sequence[Tensor]
    ) -> LossGradient:
        """The loss of ``upper`` and its total derivative, with w = w*(u, v)."""
        oracle = self._oracle(upper, batch, variables)
        try:
            with self._following(oracle):
                result = oracle.estimate(self.estimator)
                evaluation = oracle.upper_gradient.evaluation
                total = like(result.hypergradient, variables)
                gradient = tuple(
                    None if direct is None and not self._reads_below(variable, oracle) else slope
                    for slope, direct, variable in zip(total, evaluation.gradient, variables)
                )
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.name} over {self.lower.name}: {error}") from error
        metrics = dict(evaluation.metrics)
        if result.residual is not None:
            metrics["residual"] = result.residual
        _, norms = upper.require_finite(torch.tensor(evaluation.loss), gradient)
        return LossGradient(evaluation.loss, metrics, gradient, norms)

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """Within the body, w follows w* when a variable of a higher level is perturbed.

        The current point becomes the reference for g = ∂f/∂w. A nested use has no effect.
        """
        if self._anchor is not None or not isinstance(self.estimator, Solver):
            with self.lower.anchored():
                yield
            return
        oracle = self._oracle(self.middle, None, self.variables)
        with oracle.open():
            self._anchor = oracle.lower_gradient()
        try:
            with self.lower.anchored():
                yield
        finally:
            self._anchor = None

    def state_dict(self) -> dict[str, Any]:
        """The states of ``middle`` and of the lower levels, and the settings of this level."""
        return {
            "middle": self.middle.state_dict(),
            "below": self.lower.state_dict(),
            "rounds": self._rounds,
            "settings": self._settings(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ProblemError if ``state`` does not fit these levels."""
        entries = {"middle", "below", "rounds", "settings"}
        if not isinstance(state, Mapping) or state.keys() != entries:
            raise ProblemError(
                f"{self.name}: the state must have {sorted(entries)}; use a state of a Nested level"
            )
        saved = f"{self.name}: the state"
        require_settings(saved, state["settings"], "this level", self._settings())
        self.middle.check_state(state["middle"])
        self.lower.check_state(state["below"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`; raises ProblemError if ``state`` does not fit."""
        self.check_state(state)
        self.middle.load_state_dict(state["middle"])
        self.lower.load_state_dict(state["below"])
        self._rounds = state["rounds"]
        self._step.forget()

    def _settings(self) -> dict[str, Any]:
        steps = {"lower_steps": self.lower_steps, "warmup_steps": self.warmup_steps}
        return {**steps, "hypergradient": repr(self.estimator)}

    def _oracle(self, level: Problem, batch: Any, variables: Sequence[Tensor]) -> Oracle:
        """The oracle of ``level`` and the lower level, with random numbers for ``level``."""
        with replay(RandomState.capture()):  # so that the lower level's training goes on as before
            key = int(torch.randint(2**62, ()))
        seeded = partial(RandomState.seeded, devices_of(self))
        place = (self._rounds, *distributed.rank_key())
        last = self._step.last
        if last is None:
            last = StepRecord(self.lower.peek_batch(), seeded("below", *place))
        oracle = self._step.oracle(_Reading(level, variables), batch, seeded(key, *place), last)
        oracle.history = ()  # no record belongs to a perturbed point
        return oracle

    @contextmanager
    def _following(self, oracle: Oracle) -> Iterator[None]:
        """Move w by the Newton step for the body, if this level is `anchored`."""
        solver, w = self.estimator, self.lower.variables
        if self._anchor is None or not isinstance(solver, Solver):
            yield
            return
        with perturbed(w):
            with oracle.open():
                residual = oracle.lower_gradient() - self._anchor
                if residual.norm() > 0:
                    with oracle.product(solver.product, epsilon=solver.epsilon) as product:
                        newton = solver.solve(product.hessian, residual).v
                    assign_(w, w, newton.parts, -1.0)
            yield

    def _reads_below(self, variable: Tensor, oracle: Oracle) -> bool:
        """Whether the loss of the lower level reads ``variable``."""
        if variable not in self._read:
            with oracle.open(), replay(oracle.lower_random):
                (slope,) = self.lower.gradient(oracle.lower_batch, (variable,)).gradient
            self._read[variable] = slope is not None
        return self._read[variable]


class _Reading(Problem):
    """The loss of ``level`` as a function of ``variables``, which other levels may own."""

    def __init__(self, level: Problem, variables: Sequence[Tensor]) -> None:
        self.level = level
        super().__init__(variables, name=level.name)

    def differentiate(
        self, batch: object, variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        return self.level.differentiate(batch, variables)
