"""One bilevel step: what every driver does between its batches and its optimizers.

lower step:  ∂f/∂w, or ∂(f + upper_weight·F)/∂w, and a `StepRecord` of it where one is needed
upper step:  dF/du by the estimator, at the last lower step's batch and random numbers
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt_peft.core.chain import gradient_of, prepare
from hyperopt_peft.core.optimizer import read_by_options
from hyperopt_peft.core.problem import Problem, StepRecord, devices_of, require_read
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimate import check_estimator, estimate, like
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Oracle, State
from hyperopt_peft.hypergradients.state import packed, unpacked
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import TensorPool, preserve_state

Gradient = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class UpperStep:
    """A hypergradient, shaped like the upper variables, and the numbers that are logged.

    ``log`` has ``upper_loss``, ``implicit_ratio`` (‖implicit‖/‖direct‖), ``residual`` and
    ``solver_steps`` (None where the estimator has none), ``gradients`` and ``products`` (the
    forward+backward passes and the second backward passes), and ``note``. ``metrics`` are the
    upper loss's own, on this process.
    """

    hypergradient: tuple[Tensor, ...]
    log: dict[str, Any]
    metrics: dict[str, float]


@dataclass(frozen=True)
class LowerStep:
    """A step that the lower level took: f and its metrics, and the gradient's 2-norm."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]


class BilevelStep:
    """What an estimator needs of a run: records of lower steps, an oracle, its own state.

    The driver has the loop and moves the upper variables; this object does what is the same in
    `Engine`, `Nested` and `BilevelTrainer`. It alone reads `Estimator.requirements`.

    Args:
        upper: the upper level, with loss F.
        lower: the lower level, with loss f.
        estimator: what takes dF/du.
        seed: of F's random numbers (dropout), which are a function of it and the step, so that
            the upper level does not disturb the lower one's.
        look_back: whether estimators see records of lower steps; not in a chain, where
            hypergradients are taken at displaced points.

    Raises:
        ProblemError: the estimator does not go with the levels; at the first step, a variable
            that no loss reads.
    """

    def __init__(
        self,
        upper: Problem,
        lower: Problem,
        estimator: Estimator,
        *,
        seed: int = 0,
        look_back: bool = True,
    ) -> None:
        check_estimator(estimator, upper, lower)
        self.upper, self.lower, self.estimator, self.seed = upper, lower, estimator, seed
        self.look_back = look_back and estimator.requirements.history > 0
        self.requirements = estimator.requirements
        self.devices = devices_of(upper, lower)
        self.state: State = {}  # the estimator's own
        self._records: deque[StepRecord] = deque(maxlen=max(1, self.requirements.history))
        self._copies = TensorPool()
        self._unread: set[str] | None = None  # upper variables that f does not read, once known
        self._upper_read = False

    @property
    def variables(self) -> tuple[Tensor, ...]:
        """What the next lower gradient is taken with respect to: w, and u where it is needed."""
        first = self._unread is None
        u = self.upper.variables if first or self.requirements.lower_gradient else ()
        return (*self.lower.variables, *u)

    def train_lower(self, *, number: int) -> LowerStep:
        """Move the lower variables by a step of their optimizer, on the level's next batch.

        Args:
            number: of the lower step, from 1.

        Raises:
            ProblemError: f does not read one of the lower variables, at the first step.
            NonFiniteError: a loss or a gradient is NaN or infinite; nothing has moved.
        """
        prepare(self.lower)
        batch, random_state = self.lower.next_batch(), RandomState.capture(self.devices)
        evaluation = self.lower.gradient(batch, self.variables)
        gradient = self.record_lower(
            batch,
            random_state,
            evaluation.gradient,
            number=number,
            next_upper_batch=self.upper.next_batch,
        )
        norm = self.lower.step(gradient)
        return LowerStep(evaluation.loss, norm, evaluation.metrics)

    def record_lower(
        self,
        batch: Any,
        random_state: RandomState,
        gradient: Sequence[Tensor | None],
        *,
        number: int,
        next_upper_batch: Callable[[], Any],
    ) -> Gradient:
        """The gradient that a lower step descends along; its record is kept until `forget`.

        Args:
            batch: what f was given.
            random_state: the state that f's random numbers were drawn from.
            gradient: of f with respect to ``variables``, as it was when f was evaluated.
            number: of the lower step, from 1.
            next_upper_batch: gives the next batch of F, where lower steps descend F too.

        Raises:
            ProblemError: f does not read one of the lower variables, at the first step.
            NonFiniteError: F or its gradient is NaN or infinite.
        """
        needs, w = self.requirements, self.lower.variables
        of_w, of_u = tuple(gradient[: len(w)]), tuple(gradient[len(w) :])
        if self._unread is None:
            require_read(self.lower, of_w)
            options = read_by_options(self.lower)
            pairs = zip(self.upper.names, self.upper.variables, of_u, strict=True)
            self._unread = {n for n, u, g in pairs if g is None and id(u) not in options}
        if needs.upper_weight:
            of_w = self._with_upper_loss(of_w, next_upper_batch(), number)
        if len(self._records) == self._records.maxlen:
            self._forget()
        record = StepRecord(batch, random_state)
        if self.look_back:
            # torch's Nesterov step over many tensors at once writes to the gradient.
            copies = [g if g is None else g.clone() for g in of_w if needs.optimizer_state]
            record = StepRecord(
                batch,
                random_state,
                variables=self._copies.take(w),
                gradient=tuple(copies),
                upper_gradient=of_u if needs.lower_gradient else None,
                optimizer=self.lower.optimizer_snapshot(with_state=needs.optimizer_state),
            )
        self._records.append(record)
        return of_w

    @property
    def last(self) -> StepRecord | None:
        """The last lower step, if there was one since `forget`."""
        return self._records[-1] if self._records else None

    def oracle(
        self, upper: Problem, batch: Any, upper_random: RandomState, last: StepRecord
    ) -> Oracle:
        """What an estimator may ask of ``upper`` and the lower level.

        Args:
            upper: the level with loss F.
            batch: what F is given.
            upper_random: where F's random numbers begin.
            last: the lower step whose batch and random numbers f has.
        """
        return Oracle(
            upper,
            self.lower,
            batch,
            last.batch,
            upper_random=upper_random,
            lower_random=last.random_state,
            history=list(self._records) if self.look_back else (),
            copies=self._copies,
            state=self.state,
        )

    def hypergradient(self, batch: Any, *, number: int) -> UpperStep:
        """dF/du at the current point; nothing moves.

        Args:
            batch: what F is given.
            number: of the upper step; F's random numbers are a function of it and the seed.

        Raises:
            ProblemError: no loss reads one of the upper variables, at the first step.
            NonFiniteError: a loss, a gradient, a curvature or the result is NaN or infinite, or
                there was no lower step since `forget`.
        """
        if self.last is None:
            raise NonFiniteError("no lower step was possible since the last upper step")
        oracle = self.oracle(self.upper, batch, self._seeded(number), self.last)
        result = estimate(oracle, self.estimator)
        self.state = result.state
        above, u = oracle.upper_gradient.evaluation, self.upper.variables
        if not self._upper_read:
            require_read(self.upper, above.gradient[: len(u)], besides=self._unread)
            self._upper_read = True
        log = {
            "upper_loss": above.loss,
            "implicit_ratio": result.implicit_ratio,
            "residual": result.residual,
            "solver_steps": result.steps,
            "gradients": oracle.passes.gradients,
            "products": oracle.passes.products,
            "note": result.note,
        }
        return UpperStep(like(result.hypergradient, u), log, above.metrics)

    def forget(self) -> None:
        """Drop the records of lower steps: estimators look back to the last upper step."""
        while self._records:
            self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The estimator's own state, as numbers and lists of tensors."""
        return packed(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to ``state``, of `state_dict`; records of lower steps are dropped.

        Raises:
            ProblemError: ``state`` is not that of these levels; nothing has changed then.
        """
        self.state = unpacked(state, self.lower.variables)
        self.forget()

    def _with_upper_loss(self, gradient: Gradient, batch: Any, number: int) -> Gradient:
        """∂/∂w (f + upper_weight·F) from ∂f/∂w, by one forward+backward of F.

        Buffers and random states are afterwards as before.
        """
        weight, w = self.requirements.upper_weight, self.lower.variables
        with (
            preserve_state((*self.upper.variables, *w), self.devices),
            replay(self._seeded("lower step", number)),
        ):
            above = gradient_of(self.upper, self.lower, batch, w).gradient
        return tuple(
            f if g is None else weight * g if f is None else f.add(g, alpha=weight)
            for f, g in zip(gradient, above, strict=True)
        )

    def _seeded(self, *key: int | str) -> RandomState:
        return RandomState.seeded(self.devices, self.seed, *key, *distributed.rank_key())

    def _forget(self) -> None:
        record = self._records.popleft()
        if record.variables:
            self._copies.give_back(record.variables)
