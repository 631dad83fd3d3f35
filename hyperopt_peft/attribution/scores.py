"""What was trained, and one score per row: through the run's steps, or at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.run import Checkpoints, Run, Training
from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.implicit.solver import Solver
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import Passes, ProductKind
from hyperopt_peft.hypergradients.registry import get_estimator, with_options
from hyperopt_peft.hypergradients.unrolled.darts import DARTS
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.vector import Vector

#: Returns a loss, or a term of a loss.
LossPart = Callable[[], Tensor]
#: Φ, or the terms whose sum is Φ.
Loss = LossPart | Sequence[LossPart]

#: A head's estimator: conjugate gradients with exact products, to a relative residual of 1e-6.
HEAD_ESTIMATOR = "cg:steps=2000,tolerance=1e-6"


@dataclass(frozen=True)
class ScoreEstimator:
    """An estimator, its name, and the number of last steps that it differentiates; None for all."""

    estimator: Estimator
    name: str
    last_steps: int | None = None

    @property
    def differentiates_run(self) -> bool:
        """Whether steps of the run are differentiated."""
        return isinstance(self.estimator, Unrolled)


def parse_estimator(estimator: str | Estimator) -> ScoreEstimator:
    """The estimator with the name ``estimator``; ProblemError if it cannot score rows."""
    name = estimator if isinstance(estimator, str) else repr(estimator)
    kind, _, options = name.partition(":")
    if kind == "gradient":  # the identity in place of the inverse Hessian, as in one step
        return ScoreEstimator(with_options(DARTS, options), name)
    parsed = get_estimator(estimator)
    if type(parsed) is Unrolled:
        truncated = parsed.steps > 1 or "steps=" in options
        return ScoreEstimator(parsed, name, parsed.steps if truncated else None)
    if not isinstance(parsed, Solver):
        raise ProblemError(
            f"estimator: {parsed.name} gives no score for each row; choose unrolled (the whole "
            "run), an implicit solver such as minres, nystrom or cg, or gradient"
        )
    return ScoreEstimator(parsed, name)


class Evaluation(Problem):
    """min over the row weights v of Φ, the loss on the evaluation rows.

    A batch has the terms of Φ; only one term's graph is in memory at a time.
    """

    def __init__(self, weights: Tensor, loss: Loss) -> None:
        super().__init__([("weights", weights)], name="evaluation")
        parts: Any = loss if isinstance(loss, list | tuple) else [loss]
        self.parts: list[LossPart] = [*parts]
        if not self.parts or not all(map(callable, self.parts)):
            raise ProblemError(f"evaluation: give functions that return a loss, got {loss!r}")

    def loss(self, batch: LossPart) -> Tensor:
        """One term of Φ."""
        return batch()

    def terms(self, batch: Sequence[LossPart]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The terms of Φ, one after the other."""
        for function in batch:
            yield from super().terms(function)

    @torch.no_grad()
    def value(self) -> float:
        """Φ at the current point."""
        return sum(float(part()) for part in self.parts)


@dataclass(frozen=True)
class Trained:
    """A run, Φ, and the loss over all training rows at the run's end.

    Attributes:
        run: the training; a `Run` if its steps can be differentiated.
        evaluation: Φ.
        final: a level with the mean loss over all training rows and the run's variables.
        rows: returns the batch of all training rows for ``final``.
        probabilities: returns the class probabilities of given training rows, ``(k, classes)``.
        labels: the class of each training row, ``(n,)``; None if rows do not have one class each.
        columns: the columns of the training rows to show.
    """

    run: Training
    evaluation: Evaluation
    final: Problem
    rows: Callable[[], Any]
    probabilities: Callable[[Sequence[int]], Tensor] | None = None
    labels: Tensor | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    progress: bool = False


def back(
    run: Run,
    adjoint: Sequence[Tensor],
    passes: Passes,
    checkpoints: Checkpoints,
    product: ProductKind,
    last_steps: int | None,
    progress: bool,
) -> Tensor:
    """(dw_T/dv)ᵀλ, ``(n,)``; w are the run's variables, v the row weights.

    A step moves w ← U(w, g) with g = ∂f(w, v)/∂w. So

        μ = (∂U/∂g)ᵀλ,   λ ← (∂U/∂w)ᵀλ + (∂g/∂w)ᵀμ,   s ← s + (∂g/∂v)ᵀμ

    with the step's batch, random state, moments and clipping: one second backward pass. Steps
    between two checkpoints are repeated. Reverse-mode differentiation: arXiv:1502.03492; for row
    weights: arXiv:2503.13751.

    Args:
        adjoint: λ, the gradient of a function of w_T.
        checkpoints: of the run at whose end λ was computed.
        product: how second derivatives are computed.
        last_steps: the number of steps, from the end; None for all.
    """
    total, every = len(run.steps), checkpoints.every
    first = 0 if last_steps is None else max(0, total - last_steps)
    at_end, moments, s = Vector(adjoint), None, torch.zeros_like(run.weights)
    fixed = RandomState.seeded(devices_of(run.level), "attribution")
    upper = Problem([run.weights], name="row weights")
    oracle = Oracle(upper, run.level, None, None, fixed, fixed, passes=passes)
    bar = tqdm(total=total - first, disable=not progress, desc="backward")
    with oracle.open(), perturbed(run.variables), bar:
        for begin in reversed(range(first // every * every, total, every)):
            end = min(begin + every, total)
            points = [checkpoints.get(begin)]
            for number in range(begin, end - 1):
                points.append(run.advance(number, points[-1]))
                passes.gradients += 1
            for number in reversed(range(max(begin, first), end)):
                point = points.pop()
                assign_(run.variables, point[0])
                with oracle.product(product, at=run.step_record(number, point)) as products:
                    step = run.step_record(number, point, products.lower_gradient())
                    w_bar, g_bar, moments = run.optimizer.vjp(step, at_end, moments)
                    hessian, (of_weights,) = products.both(g_bar)
                    at_end, s = w_bar + hessian, s + of_weights
                bar.update()
    return s


def scores(
    trained: Trained, estimator: ScoreEstimator, checkpoints: Checkpoints | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """dΦ/dv, ``(n,)`` in float64, at the variables' current values; and the cost.

    The cost counts forward-backward passes as ``gradients`` and second backward passes as
    ``products``; a solver adds its relative ``residual`` and a ``note``. ``checkpoints`` belong to
    the run that led to the current values, by default the recorded run.

    Raises:
        NonFiniteError: a loss, a gradient, a curvature or a score is NaN or infinite.
    """
    run, kind, evaluation = trained.run, estimator.estimator, trained.evaluation
    through, passes = isinstance(kind, Unrolled), Passes()
    level = Problem(run.variables, name="the run") if through else trained.final
    rows = None if through else trained.rows()
    fixed = RandomState.seeded(devices_of(level), "attribution")
    oracle = Oracle(evaluation, level, evaluation.parts, rows, fixed, fixed, passes=passes)
    cost = dict[str, Any]()
    if isinstance(kind, Unrolled):
        assert isinstance(run, Run)
        with oracle.open():
            adjoint = oracle.upper_gradient.b.parts
        how = kind.product, estimator.last_steps, trained.progress
        result = back(run, adjoint, passes, checkpoints or run.checkpoints, *how)
    else:
        estimate = oracle.estimate(kind)
        result = estimate.implicit.flat()
        cost = {"residual": estimate.residual, "note": estimate.note}
    counted = {"gradients": passes.gradients, "products": passes.products}
    return result.to("cpu", torch.float64), cost | counted
