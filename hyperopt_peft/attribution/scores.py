"""What was trained, and one score per row: through the run's steps, or at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hyperopt_peft.attribution.run import Checkpoints, Point, Run, Training
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

    ``slices`` maps a name to each Φ; a single Φ gets the name ``"all"``. A batch has the terms of
    one slice's Φ. Only one term's graph is in memory at a time. ``shares`` are the slices' weights
    in the mean Φ, by default equal.
    """

    def __init__(
        self,
        weights: Tensor,
        slices: Loss | Mapping[str, Loss],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__([("weights", weights)], name="evaluation")
        named: Mapping[str, Any] = slices if isinstance(slices, Mapping) else {"all": slices}
        self.slices: dict[str, Sequence[LossPart]] = {
            str(name): list(loss) if isinstance(loss, list | tuple) else [loss]
            for name, loss in named.items()
        }
        functions = [function for loss in self.slices.values() for function in loss]
        if not functions or not all(map(callable, functions)):
            raise ProblemError(f"evaluation: give functions that return a loss, got {slices!r}")
        self.shares = shares or dict.fromkeys(self.slices, 1 / len(self.slices))

    def loss(self, batch: LossPart) -> Tensor:
        """One term of Φ."""
        return batch()

    def terms(self, batch: Sequence[LossPart]) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """The terms of Φ, one after the other."""
        for function in batch:
            yield from super().terms(function)

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Φ of each slice at the current point."""
        return {name: sum(float(part()) for part in parts) for name, parts in self.slices.items()}

    def total(self, by_slice: Mapping[str, Any]) -> Any:
        """The mean over the slices, weighted by ``shares``."""
        return sum(self.shares[name] * value for name, value in by_slice.items())


@dataclass(frozen=True)
class Trained:
    """A run, Φ, and the loss over all training rows at the run's end.

    Attributes:
        run: the training; a `Run` if its steps can be differentiated.
        evaluation: Φ of each slice.
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


class Sweep:
    """(dw_T/dv)ᵀλ for each λ in ``adjoints``; w are the run's variables, v the row weights.

    A step moves w ← Φ(w, g) with g = ∂f(w, v)/∂w. So

        μ = (∂Φ/∂g)ᵀλ,   λ ← (∂Φ/∂w)ᵀλ + (∂g/∂w)ᵀμ,   s ← s + (∂g/∂v)ᵀμ

    with the step's batch, random state, moments and clipping. A λ needs one second backward pass.
    Steps between two checkpoints are repeated. Reverse-mode differentiation: arXiv:1502.03492; for
    row weights: arXiv:2503.13751.

    Args:
        adjoints: gradients of functions of w_T, each with one tensor per variable.
        product: how second derivatives are computed.
    """

    def __init__(
        self,
        run: Run,
        adjoints: Sequence[Sequence[Tensor]],
        passes: Passes,
        product: ProductKind = "exact",
    ) -> None:
        self.run, self.product, self.passes = run, product, passes
        self.adjoints = [list(adjoint) for adjoint in adjoints]
        self.moments: list[list[Tensor] | None] = [None] * len(adjoints)
        self.products = [torch.zeros_like(run.weights) for _ in adjoints]
        fixed = RandomState.seeded(devices_of(run.level), "attribution")
        upper = Problem([run.weights], name="row weights")
        self.oracle = Oracle(upper, run.level, None, None, fixed, fixed, passes=passes)

    def back(
        self, checkpoints: Checkpoints, *, last_steps: int | None = None, progress: bool = False
    ) -> list[Tensor]:
        """(dw_T/dv)ᵀλ for each λ, ``(n,)``, through the ``last_steps`` last steps; None for all.

        ``checkpoints`` must belong to the run at whose end the adjoints were computed.
        """
        run, total, every = self.run, len(self.run.steps), checkpoints.every
        first = 0 if last_steps is None else max(0, total - last_steps)
        bar = tqdm(total=total - first, disable=not progress, desc="backward")
        with self.oracle.open(), perturbed(run.variables), bar:
            for begin in reversed(range(first // every * every, total, every)):
                end = min(begin + every, total)
                points = [checkpoints.get(begin)]
                for number in range(begin, end - 1):
                    points.append(run.advance(number, points[-1]))
                    self.passes.gradients += 1
                for number in reversed(range(max(begin, first), end)):
                    self._pull(number, points.pop())
                    bar.update()
        return self.products

    def _pull(self, number: int, point: Point) -> None:
        """Replace the adjoints after the step ``number`` by those before it."""
        run = self.run
        assign_(run.variables, point[0])
        at = run.step_record(number, point)
        with self.oracle.product(self.product, at=at) as product:
            record = run.step_record(number, point, product.lower_gradient())
            for k, adjoint in enumerate(self.adjoints):
                w_bar, g_bar, self.moments[k], _ = run.optimizer.vjp(
                    record, Vector(adjoint), self.moments[k]
                )
                hessian, (of_weights,) = product.both(g_bar)
                self.products[k] = self.products[k] + of_weights
                self.adjoints[k] = [x + y for x, y in zip(w_bar, hessian, strict=True)]


def scores(
    trained: Trained, estimator: ScoreEstimator, checkpoints: Checkpoints | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """dΦ/dv of each slice, ``(n,)`` in float64, at the variables' current values; and the cost.

    The cost counts forward-backward passes as ``gradients`` and second backward passes as
    ``products``; a solver adds the relative ``residuals`` by slice and its ``notes``.
    ``checkpoints`` belong to the run that led to the current values, by default the recorded run.

    Raises:
        NonFiniteError: a loss, a gradient, a curvature or a score is NaN or infinite.
    """
    passes, run, kind, results = Passes(), trained.run, estimator.estimator, list[Any]()
    through = estimator.differentiates_run
    level = Problem(run.variables, name="the run") if through else trained.final
    rows = None if through else trained.rows()
    fixed = RandomState.seeded(devices_of(level), "attribution")
    oracles = [
        Oracle(trained.evaluation, level, losses, rows, fixed, fixed, passes=passes)
        for losses in trained.evaluation.slices.values()
    ]
    if isinstance(kind, Unrolled):
        assert isinstance(run, Run)
        adjoints = []
        for oracle in oracles:
            with oracle.open():
                adjoints.append(oracle.upper_gradient.b.parts)
        sweep = Sweep(run, adjoints, passes, kind.product)
        points = checkpoints or run.checkpoints
        products = sweep.back(points, last_steps=estimator.last_steps, progress=trained.progress)
    else:
        results = [oracle.estimate(kind) for oracle in oracles]
        products = [result.implicit.flat() for result in results]
    names = trained.evaluation.slices
    by_slice = {k: s.to("cpu", torch.float64) for k, s in zip(names, products, strict=True)}
    return by_slice, {
        "gradients": passes.gradients,
        "products": passes.products,
        "residuals": {k: x.residual for k, x in zip(names, results) if x.residual is not None},
        "notes": list(dict.fromkeys(result.note for result in results if result.note)),
    }
