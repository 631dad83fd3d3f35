"""From a run to one score a row: through the run's steps, or at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.attribution.checkpoints import Checkpoints
from hyperopt_peft.attribution.estimators import ScoreEstimator
from hyperopt_peft.attribution.evaluation import Evaluation
from hyperopt_peft.attribution.reverse import Sweep
from hyperopt_peft.attribution.run import Run
from hyperopt_peft.attribution.training import Training
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import Passes
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from hyperopt_peft.utils.random_state import RandomState


def measured(test: Any) -> Callable[[], Mapping[str, float]]:
    """A function that measures what ``test``, a function, returns: a loss or a mapping."""

    @torch.no_grad()
    def measure() -> Mapping[str, float]:
        result = test()
        named = result if isinstance(result, Mapping) else {"loss": result}
        return {name: float(value) for name, value in named.items()}

    return measure


@dataclass(frozen=True)
class RetrainingSetup:
    """A run, Φ, and the loss over all training rows at the run's end.

    Attributes:
        run: the training, a `Run` where it has steps that are differentiated.
        evaluation: Φ, by slice.
        shares: the share of each slice in the whole Φ.
        final: the level with the mean loss over all rows, over the run's variables.
        rows: its batch.
        measure: from test rows, a function that measures the model on them.
        enlarged: the training with the evaluation rows among the training rows, of as many visits,
            in an order of the seed; None where it is not known.
        probabilities: of a classifier with one class a row, a function from rows to the class
            probabilities.
        labels: likewise, the class of each row, ``(n,)``.
        progress: whether retrainings show a progress bar.
    """

    run: Training
    evaluation: Evaluation
    shares: dict[str, float]
    final: Problem
    rows: Callable[[], Any]
    measure: Callable[[Any], Callable[[], Mapping[str, float]]] = measured
    enlarged: Callable[[int], AbstractContextManager[None]] | None = None
    probabilities: Callable[[Sequence[int]], Tensor] | None = None
    labels: Tensor | None = None
    progress: bool = False

    def values(self) -> dict[str, float]:
        """Φ of each slice at the current point."""
        return {name: self.evaluation.value(name) for name in self.evaluation.slices}

    def total(self, by_slice: dict[str, Any]) -> Any:
        """The sum over the slices by their shares."""
        return sum(self.shares[name] * value for name, value in by_slice.items())


def scores(
    setup: RetrainingSetup,
    estimator: ScoreEstimator,
    checkpoints: Checkpoints | None = None,
    *,
    progress: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """dΦ/dv of each slice, ``(n,)`` in float64, at the current end of the run; and the cost.

    The cost has the forward+backward passes, ``gradients``, the second backward passes,
    ``products``, and of a solver the relative ``residuals`` by slice and its ``notes``.
    ``checkpoints`` are those of a run that led to the current point, by default the recorded one's.

    Raises:
        NonFiniteError: a loss, a gradient, a curvature or a score is NaN or infinite.
    """
    passes, residuals, notes, run = Passes(), {}, {}, setup.run
    names, level, rows = list(setup.evaluation.slices), setup.final, None
    if estimator.differentiates_run:
        variables = [(str(number), variable) for number, variable in enumerate(run.variables)]
        level = Problem(variables, name="the run")
    else:
        rows = setup.rows()
    fixed = RandomState.seeded(level.devices, "attribution")
    oracles = [
        Oracle(setup.evaluation, level, losses, rows, fixed, fixed, passes=passes)
        for losses in setup.evaluation.slices.values()
    ]
    if isinstance(estimator.estimator, Unrolled) and isinstance(run, Run):
        adjoints = []
        for oracle in oracles:
            with oracle.open():
                adjoints.append(oracle.upper_gradient.b.parts)
        sweep, points = Sweep(run, adjoints, passes, estimator.estimator.product), run.checkpoints
        options: dict[str, Any] = {"last_steps": estimator.last_steps, "progress": progress}
        products = sweep.back(checkpoints or points, **options)
    else:
        results = [oracle.estimate(estimator.estimator) for oracle in oracles]
        products = [result.implicit.flat() for result in results]
        by_name = zip(names, results, strict=True)
        residuals = {k: result.residual for k, result in by_name if result.residual is not None}
        notes = dict.fromkeys(result.note for result in results if result.note)
    by_slice = {k: s.to("cpu", torch.float64) for k, s in zip(names, products, strict=True)}
    cost = {"gradients": passes.gradients, "products": passes.products}
    return by_slice, {**cost, "residuals": residuals, "notes": list(notes)}
