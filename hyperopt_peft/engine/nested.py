"""A `Nested` level stands on a level of its own: chains of three levels and more.

    min_u F(u, v*, w*),   v*(u) = argmin_v G(u, v, w*(u, v)),   w*(u, v) = argmin_w f(u, v, w)

is ``Engine(top, Nested(middle, lower), "cg:product=difference")``; below the top of a chain of
four stands ``Nested(second, Nested(third, fourth))``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.chain import Chain, anchored, differences, is_chain, levels_of
from hyperopt_peft.core.optimizer import read_by_options
from hyperopt_peft.core.problem import Evaluation, Problem, StepRecord
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import estimate, like
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.implicit.cg import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.solver import Solver
from hyperopt_peft.hypergradients.oracle import Oracle, check_ownership
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.validation import require_count, require_settings
from hyperopt_peft.utils.vector import Vector


class Nested(Chain):
    """The level ``middle`` over the level ``lower``, whose variables w it sees as w*(u, v).

    It owns v and minimises G̃(u, v) = G(u, v, w*(u, v)). Its ``gradient`` is the total one,
    with respect to any x of u and v:

        ∂G̃/∂x = ∂G/∂x − ∂²f/∂x∂w · [∂²f/∂w²]⁻¹ · ∂G/∂w

    The level above needs no more than this gradient at displaced points, since ∂²G̃/∂u∂v is
    symmetric: any estimator with ``product="difference"`` will do. F is a function of u and v
    too: where it reads w, `gradient_of` takes its derivatives through w*.

    Where v is displaced, w follows by Newton steps on f, and is put back bit for bit:

        w ← w − [∂²f/∂w²]⁻¹ (∂f/∂w − g),   g = ∂f/∂w where nothing is displaced

    With g, the w that training has reached counts as w*, however far it has come. One step is
    exact on a quadratic f; on another, its error is that of the difference itself.

    In training each step of ``middle`` comes after ``lower_steps`` of ``lower``. Derivatives of
    f are taken on the batch and the random numbers of its last step; before the first one, on
    the batch that comes next. `Engine`'s records get ``lower_below_loss`` and
    ``lower_below_grad_norm`` of the level below, and ``lower_residual`` and
    ``upper_residual``, those of the inner solves for G̃ and for F.

    Args:
        middle: the level above ``lower``; its variables, optimizer and data are this level's.
        lower: the level below, itself a `Nested` in a chain of four levels and more.
        hypergradient: the estimator of the total derivatives. Their differences are divided by
            a small step, so a solver should do a fixed number of steps or have a small
            ``tolerance``: by default CG, 20 steps, 1e-12.
        lower_steps: steps of ``lower`` before each of ``middle``.
        warmup_steps: further ones before the very first.
        follow: Newton steps of w. 1 by default; 0, the default of estimators that are no
            solvers (darts), holds w where it is and so leaves a part of ∂²G̃ out.

    Raises:
        ProblemError: levels that share a tensor, a nested ``middle``, an estimator that does
            not fit, or (at the first step) a variable of ``lower`` that no loss reads.
    """

    def __init__(
        self,
        middle: Problem,
        lower: Problem,
        hypergradient: str | Estimator | None = None,
        *,
        lower_steps: int = 1,
        warmup_steps: int = 0,
        follow: int | None = None,
    ) -> None:
        check_ownership(middle, lower)
        self.middle, self.lower = middle, lower
        super().__init__(zip(middle.names, middle.variables, strict=True), name=middle.name)
        self.batches, self.max_grad_norm = middle.batches, middle.max_grad_norm
        self.optimizer, self.scheduler = middle.optimizer, middle.scheduler
        require_count("lower_steps", lower_steps, least=1)
        require_count("warmup_steps", warmup_steps, least=0)
        self.lower_steps, self.warmup_steps = lower_steps, warmup_steps
        product: ProductKind = "difference" if is_chain(lower) else "exact"
        default = ConjugateGradient(steps=20, tolerance=1e-12, product=product)
        self.estimator = get_estimator(hypergradient or default)
        self._step = BilevelStep(middle, lower, self.estimator, look_back=False)
        if self.estimator.requirements.upper_weight:
            raise ProblemError(
                f"{self.estimator.name} owns the updates of both levels, which a chain does not "
                "give it; choose cg or minres below, and it between the upper two levels"
            )
        solves = isinstance(self.estimator, Solver)
        self.follow = int(solves) if follow is None else follow
        require_count("follow", self.follow, least=0)
        if self.follow and not solves:
            raise ProblemError(
                f"{self.name}: {self.estimator.name} is no solver, so {lower.name} cannot follow; "
                'choose one such as "cg", or follow=0'
            )
        self._prepared = 0  # how often the levels below were trained
        self._trained = 0  # how many of their steps were taken
        self._below: dict[str, float] = {}  # how it went
        self._rest: Vector | None = None  # ∂f/∂w where nothing is displaced, while `anchored`
        self._read: dict[Tensor, bool] = {}  # whether the level below reads a variable

    def optimizer_options(self) -> Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]:
        """Those of the middle level."""
        return self.middle.optimizer_options()

    @property
    def levels(self) -> tuple[Problem, ...]:
        """This level and those below it."""
        return (self, *levels_of(self.lower))

    @property
    def differences(self) -> int:
        """How many finite differences, one of another, the gradient is made of."""
        exact = self.estimator.requirements.second_derivatives
        own = not (exact or isinstance(self.estimator, Direct))
        return differences(self.lower) + own

    @property
    def devices(self) -> list[torch.device]:
        """The devices that hold the variables of this level and of those below."""
        return list(dict.fromkeys([*super().devices, *self.lower.devices]))

    def loss(self, batch: Any) -> Tensor | Mapping[str, Any]:
        """G where w is now."""
        return self.middle.loss(batch)

    def next_batch(self) -> Any:
        """The next batch of ``middle``'s data."""
        return self.middle.next_batch()

    def peek_batch(self) -> Any:
        """The batch that ``next_batch`` will return."""
        return self.middle.peek_batch()

    def step(self, gradient: Sequence[Tensor | None]) -> float:
        """One step of ``middle``'s optimizer and scheduler; see `Problem.step`."""
        return self.middle.step(gradient)

    def prepare(self) -> None:
        """``lower_steps`` steps of the level below.

        Raises:
            ProblemError: no loss reads a variable of the level below, at the first step.
            NonFiniteError: a loss or gradient of it is NaN or infinite.
        """
        steps = self.lower_steps + (0 if self._prepared else self.warmup_steps)
        for _ in range(steps):
            self._trained += 1
            below = self._step.train_lower(number=self._trained)
        self._prepared += 1
        log = {"loss": below.loss, "grad_norm": below.grad_norm, **below.metrics}
        self._below = {f"below_{key}": value for key, value in log.items()}

    def gradient(self, batch: Any, variables: Sequence[Tensor]) -> Evaluation:
        """G and ∂G̃/∂variables; None where no loss from G downwards reads one.

        Raises:
            NonFiniteError: a loss, a gradient or a curvature is NaN or infinite.
        """
        evaluation = self.gradient_of(self.middle, batch, variables)
        return replace(evaluation, metrics=evaluation.metrics | self._below)

    def gradient_of(self, level: Problem, batch: Any, variables: Sequence[Tensor]) -> Evaluation:
        """The loss of ``level`` and its gradient, with w a function of all other variables."""
        oracle = self._oracle(level, batch, variables)
        try:
            with self._following(oracle):
                result = estimate(oracle, self.estimator)
                evaluation = oracle.upper_gradient.evaluation
                total = like(result.hypergradient, variables)
                gradient = tuple(
                    part if known is not None or self._reads_below(variable, oracle) else None
                    for part, known, variable in zip(total, evaluation.gradient, variables)
                )
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.name} over {self.lower.name}: {error}") from error
        self.half = bool(self.middle.half or self.lower.half)
        residual = {} if result.residual is None else {"residual": result.residual}
        return replace(evaluation, metrics=evaluation.metrics | residual, gradient=gradient)

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """Let those below follow the levels above, from here; idle in another such body."""
        if self._rest is not None or not self.follow:
            with anchored(self.lower):
                yield
            return
        oracle = self._oracle(self.middle, None, self.variables)
        with oracle.open():
            self._rest = oracle.lower_gradient()
        try:
            with anchored(self.lower):
                yield
        finally:
            self._rest = None

    def state_dict(self) -> dict[str, Any]:
        """The states of ``middle`` and of the levels below, and what they were trained with."""
        return {
            "middle": self.middle.state_dict(),
            "below": self.lower.state_dict(),
            "prepared": self._prepared,
            "settings": self._settings(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ProblemError where ``state`` is not that of a chain like this one."""
        parts = {"middle", "below", "prepared", "settings"}
        if not isinstance(state, Mapping) or state.keys() != parts:
            raise ProblemError(f"{self.name}: the state is not that of a level over others")
        made = f"{self.name}: the state"
        require_settings(made, state["settings"], "this level", self._settings())
        self.middle.check_state(state["middle"])
        self.lower.check_state(state["below"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to ``state``; nothing is changed where it does not fit (ProblemError)."""
        self.check_state(state)
        self.middle.load_state_dict(state["middle"])
        self.lower.load_state_dict(state["below"])
        self._prepared = state["prepared"]
        self._step.forget()

    def _settings(self) -> dict[str, Any]:
        settings = {key: getattr(self, key) for key in ("lower_steps", "warmup_steps", "follow")}
        return {**settings, "hypergradient": repr(self.estimator)}

    def _oracle(self, level: Problem, batch: Any, variables: Sequence[Tensor]) -> Oracle:
        """``level`` over the level below, with the random numbers of this moment for ``level``.

        They are a function of the current random state, which is not used up, and of the
        step: the training of the level below goes on as if nothing had been asked.
        """
        with replay(RandomState.capture()):
            key = int(torch.randint(2**62, ()))
        own = (self._prepared, *distributed.rank_key())
        last = self._step.last
        if last is None:
            random_state = RandomState.seeded(self.devices, "below", *own)
            last = StepRecord(self.lower.peek_batch(), random_state)
        upper_random = RandomState.seeded(self.devices, key, *own)
        return self._step.oracle(_Reading(level, variables), batch, upper_random, last)

    @contextmanager
    def _following(self, oracle: Oracle) -> Iterator[None]:
        """Run the body where w has followed, if this level is `anchored`."""
        solver, w = self.estimator, self.lower.variables
        if self._rest is None or not isinstance(solver, Solver):
            yield
            return
        with perturbed(w):
            with oracle.open():
                for _ in range(self.follow):
                    residual = oracle.lower_gradient() - self._rest
                    if residual.norm() == 0:
                        break
                    with oracle.product(solver.product, epsilon=solver.epsilon) as product:
                        newton = solver.solve(product.hessian, residual).v
                    assign_(w, w, newton.parts, -1.0)
            yield

    def _reads_below(self, variable: Tensor, oracle: Oracle) -> bool:
        """Whether the level below reads ``variable``, in its loss or its optimizer; asked once."""
        if variable not in self._read:
            with oracle.open(), replay(oracle.lower_random):
                (part,) = self.lower.gradient(oracle.lower_batch, (variable,)).gradient
            read = part is not None or id(variable) in read_by_options(self.lower)
            self._read[variable] = read
        return self._read[variable]


class _Reading(Problem):
    """The loss of ``level`` as a function of ``variables``, whoever owns them."""

    def __init__(self, level: Problem, variables: Sequence[Tensor]) -> None:
        self.level = level
        super().__init__(variables, name=level.name)

    def gradient(self, batch: Any, variables: Sequence[Tensor]) -> Evaluation:
        return self.level.gradient(batch, variables)
