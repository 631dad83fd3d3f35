"""One bilevel step, shared by `Engine`, `Nested` and `BilevelTrainer`.

    lower step: w ← step(w, ∂f/∂w)
    upper step: u ← step(u, dF/du)          dF/du by an estimator

The estimator evaluates f on the batch and the random numbers of the last lower step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem, StepRecord, devices_of
from hyperopt_peft.core.validation import require_read
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import (
    check_estimator,
    check_products,
    like,
    of_residual,
    warn,
)
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Oracle, State
from hyperopt_peft.hypergradients.products import DIFFERENCE
from hyperopt_peft.hypergradients.state import packed, unpacked
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.autograd import HALF, once_differentiable_functions, uncompiled
from hyperopt_peft.utils.distributed import to_local
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.restore import TensorPool
from hyperopt_peft.utils.signal_to_noise import SignalToNoise

Gradient = tuple[Tensor | None, ...]
#: A relative residual above which a solution is worse than v = 0, whose residual is 1.
DIVERGED = 1.5
#: The number of upper steps after which variables in half precision should have moved.
RESTING = 10


@dataclass(frozen=True)
class UpperStep:
    """dF/du at one point, and the numbers for the log."""

    hypergradient: tuple[Tensor, ...]
    grad_norm: float
    log: dict[str, Any]  # the entries of `Engine.history` from F and the estimator
    metrics: dict[str, float]  # of F on this process, with the prior if the level has one


class BilevelStep:
    """The lower step and the hypergradient of `Engine`, `Nested` and `BilevelTrainer`.

    A driver has the loop and moves the upper variables. This class records the lower steps as the
    estimator requires (at most ``recorded``), builds its `Oracle`, and holds its state.
    ``uncounted`` is a context for passes that only check.
    """

    def __init__(
        self,
        upper: Problem,
        lower: Problem,
        estimator: Estimator,
        *,
        seed: int = 0,
        recorded: int = 1,
        uncounted: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        check_estimator(estimator, upper, lower)
        self.upper, self.lower, self.estimator, self.seed = upper, lower, estimator, seed
        self.requirements, self.uncounted = estimator.requirements, uncounted
        self.devices = devices_of(upper, lower)
        self.state: State = {}  # the estimator's own
        self.signal = SignalToNoise()  # of the hypergradients since it was last read
        length = min(recorded, max(1, self.requirements.history))
        self._records: deque[StepRecord] = deque(maxlen=length)
        self._copies = TensorPool()
        self._ahead: Oracle | None = None  # of `look_ahead`
        self._unread: set[str] | None = None  # upper variables that f does not read, once known
        self._diverged = False
        self.count, self._start = 0, list[Tensor]()  # upper steps, and variables at the first

    @property
    def variables(self) -> tuple[Tensor, ...]:
        """The variables of the next lower gradient: w, and u if ∂f/∂u is required."""
        first = self._unread is None
        u = self.upper.variables if first or self.requirements.lower_gradient else ()
        return (*self.lower.variables, *u)

    def train_lower(self, *, solved: bool = False) -> tuple[float, float, dict[str, float]]:
        """Do a lower step on the lower level's next batch.

        Returns f without the prior, the 2-norm of ∂f/∂w, and the metrics of f. If f is already
        ``solved`` on that batch, the step is recorded and w does not move. Nothing moves where a
        loss or a gradient is not finite, which raises NonFiniteError.
        """
        batch, random_state = self.lower.next_batch(), RandomState.capture(self.devices)
        with self.observe():
            evaluation = self.lower.gradient(batch, self.variables)
        gradient = self.record_lower(batch, random_state, evaluation.gradient)
        norm = math.hypot(*evaluation.norms[: len(gradient)])
        if not solved:
            norm = self.lower.step(gradient, norm)
        loss = evaluation.loss - prior_of(self.lower, evaluation.metrics)
        return loss, norm, evaluation.metrics

    def check_graph(self, loss: Tensor) -> None:
        """Raise ProblemError if the first lower ``loss`` lacks a required second derivative."""
        exact = self._unread is None and self.requirements.second_derivatives
        if exact and (names := once_differentiable_functions(loss)):
            raise ProblemError(
                f"{self.estimator.name}: the loss of {self.lower.name} has no second derivative "
                f"({names[0]} is differentiable once, not twice); {DIFFERENCE}"
            )

    def record_lower(
        self, batch: object, random_state: RandomState, gradient: Sequence[Tensor | None]
    ) -> Gradient:
        """Record a lower step on ``batch``; returns ∂f/∂w.

        ``random_state`` has the generator states before f was evaluated; ``gradient`` is the
        gradient of f with respect to `variables`, as they were before the evaluation. Raises
        ProblemError if f does not read a lower variable at the first step, and as `Dots.check`.
        """
        needs, w = self.requirements, self.lower.variables
        of_w, of_u = tuple(gradient[: len(w)]), tuple(gradient[len(w) :])
        if self._unread is None:
            require_read(self.lower, of_w)
            pairs = zip(self.upper.names, of_u, strict=True)
            self._unread = {name for name, gradient in pairs if gradient is None}
        if self._ahead is not None and self._ahead.dots is not None:
            self._ahead.dots.check(of_w)
        if len(self._records) == self._records.maxlen:
            self._forget_first()
        record = StepRecord(batch, random_state)
        if needs.history:
            # torch's foreach step with Nesterov momentum overwrites the gradient.
            copies = [g if g is None else g.clone() for g in of_w if needs.optimizer_state]
            record = replace(
                record,
                variables=self._copies.take(w),
                gradient=tuple(copies),
                upper_gradient=of_u if needs.lower_gradient else None,
                optimizer=self.lower.optimizer_snapshot(with_state=needs.optimizer_state),
            )
        self._records.append(record)
        return of_w

    @property
    def last(self) -> StepRecord | None:
        """The last lower step since `forget`, or None."""
        return self._records[-1] if self._records else None

    def oracle(
        self, upper: Problem, batch: object, upper_random: RandomState, last: StepRecord
    ) -> Oracle:
        """The oracle of ``upper`` and the lower level.

        Evaluations of f use the batch and the generator states of the lower step ``last``.
        """
        return Oracle(
            upper,
            self.lower,
            batch,
            last.batch,
            upper_random=upper_random,
            lower_random=last.random_state,
            history=list(self._records) if self.requirements.history else (),
            copies=self._copies,
            state=self.state,
            implicit=not isinstance(self.estimator, Direct),
        )

    def look_ahead(self, batch: object, *, number: int) -> None:
        """Differentiate F on ``batch``, before the passes of the lower step at the same point.

        This is for an estimator with `Requirements.observe`: the lower step's passes in `observe`
        then collect its dot products. `hypergradient` comes next, with the same arguments.
        """
        self._ahead = None
        now = StepRecord(None, RandomState.capture(self.devices))
        oracle = self.oracle(self.upper, batch, self._seeded(number), now)
        with oracle.open():
            oracle.dots = self.estimator.observe(oracle)
        self._ahead = oracle

    def observe(self) -> AbstractContextManager[None]:
        """Collect the dot products of the lower step's passes in the body, if required."""
        if self.requirements.lower_gradient:  # a difference subtracts it from uncompiled gradients
            return uncompiled()
        dots = None if self._ahead is None else self._ahead.dots
        return nullcontext() if dots is None else dots.observe()

    def hypergradient(self, batch: object, *, number: int) -> UpperStep:
        """dF/du at the current point on ``batch``; no variable moves.

        F's random numbers are a function of the seed and the ``number`` of the upper step. Raises
        ProblemError if no loss reads an upper variable at the first step, and NonFiniteError, also
        if no lower step was recorded since `forget`.

        Warns:
            HypergradientWarning: the estimator is `Direct`, and F does not read an upper variable;
                or it is another, and F reads no lower variable or the hypergradient is exactly 0.
                Once: exact products are not differences of gradients (at the first step, by five
                passes and a product, in no count); the residual is above 1.5; or variables in half
                precision are unchanged after ten steps.
        """
        if self.last is None:
            raise NonFiniteError(
                f"{self.lower.name}: no lower step was finite since the last upper step"
            )
        oracle = self.oracle(self.upper, batch, self._seeded(number), self.last)
        if (ahead := self._ahead) is not None:
            oracle.upper_gradient, oracle.passes = ahead.upper_gradient, ahead.passes
            oracle.dots = ahead.dots
        result = oracle.estimate(self.estimator)
        self.state = result.state
        self.signal.add(result.hypergradient)
        above, u = oracle.upper_gradient.evaluation, self.upper.variables
        if self.count == 0:
            self._require_read(above.gradient[: len(u)], above.gradient[len(u) :])
            with self.uncounted():
                words = check_products(self.estimator, oracle)
            if words:
                warn(words)
        log = {
            "upper_loss": above.loss - prior_of(self.upper, above.metrics),
            "implicit_ratio": result.implicit_ratio,
            "residual": result.residual,
            "solver_steps": result.steps,
            "gradients": oracle.passes.gradients,
            "products": oracle.passes.products,
            "note": result.note,
        }
        if result.norms[0] == 0 < oracle.upper_gradient.norm and self.estimator.name != "direct":
            warn(
                f"{self.estimator.name}: the hypergradient of {self.upper.name} is exactly 0"
                f"{result.note and f' ({result.note})'}; take more lower steps first, add damping, "
                "or choose another estimator"
            )
        elif (result.residual or 0.0) > DIVERGED and not self._diverged:
            self._diverged = True
            warn(of_residual(self.estimator, result))
        self._watch_rounding(result.norms[0])
        return UpperStep(like(result.hypergradient, u), result.norms[0], log, above.metrics)

    def forget(self) -> None:
        """Delete the records of lower steps; drivers call this after each upper step."""
        self._ahead = None
        while self._records:
            self._forget_first()

    def state_dict(self) -> dict[str, Any]:
        """The estimator's state, as numbers and lists of tensors."""
        return packed(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`, and delete the records of lower steps."""
        self.state = unpacked(state, self.lower.variables)
        self.forget()

    def _require_read(self, of_u: Sequence[Tensor | None], of_w: Sequence[Tensor | None]) -> None:
        """Raise ProblemError if no loss reads an upper variable; warn if a term is 0."""
        require_read(self.upper, of_u, besides=self._unread)
        direct, name = isinstance(self.estimator, Direct), self.upper.name
        unread = [n for n, g in zip(self.upper.names, of_u, strict=True) if g is None]
        if direct and unread:
            warn(
                f"{name}: the loss does not read {unread[0]!r}, so that direct never moves it; "
                "choose an estimator with an implicit term, such as darts"
            )
        if not direct and all(g is None for g in of_w):  # F may read a copy of the model
            warn(
                f"{name}: the loss reads no variable of {self.lower.name}, so that the "
                "hypergradient has no implicit term; let it read the variables of that level"
            )

    def _watch_rounding(self, norm: float) -> None:
        """Warn if upper variables in half precision rest through `RESTING` steps."""
        here = [x.detach() for x in to_local(self.upper.variables) if x.dtype in HALF and x.numel()]
        self.count += 1
        if self.count == 1:
            self._start = [x.clone() for x in here]
        elif self.count == RESTING + 1 and here and norm:
            if all(map(torch.equal, here, self._start)):
                warn(
                    f"{self.upper.name}: after {RESTING} steps the variables in {here[0].dtype} "
                    "are unchanged: each step is below their rounding; keep them in float32, or "
                    "raise their learning rate"
                )
            self._start = []

    def _seeded(self, *key: int | str) -> RandomState:
        return RandomState.seeded(self.devices, self.seed, *key, *distributed.rank_key())

    def _forget_first(self) -> None:
        record = self._records.popleft()
        if record.variables:
            self._copies.give_back(record.variables)


def prior_of(level: Problem, metrics: Mapping[str, float]) -> float:
    """The prior that a loss of ``level`` with ``metrics`` includes; records list it apart."""
    return 0.0 if level.prior is None else metrics["prior"]


def require_history(estimator: Estimator, *, lower_steps: int, recorded: int) -> None:
    """Raise ProblemError if ``estimator`` needs more records of lower steps than there are.

    The Engine records all ``lower_steps`` before each upper step, the Trainer only the last.
    """
    needed = estimator.requirements.history
    if needed > recorded:
        raise ProblemError(
            f"hypergradient: {estimator.name} needs records of the last {needed} lower steps "
            f"before each upper step, and {recorded} of lower_steps={lower_steps} are recorded; "
            f"use the Engine with lower_steps={needed}, or change the options of the estimator"
        )
