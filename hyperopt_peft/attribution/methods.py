"""From a run to one score a row: by the whole run, at its end, or by gradients alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.attribution.checkpoints import Checkpoints
from hyperopt_peft.attribution.evaluation import Evaluation
from hyperopt_peft.attribution.reverse import Sweep
from hyperopt_peft.attribution.run import Run
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimate import estimate
from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Estimator
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import Passes, ProductKind
from hyperopt_peft.hypergradients.registry import get_estimator, with_options
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.vector import Vector


@dataclass(frozen=True)
class Gradient(Solver):
    """s_i = −⟨∂Φ/∂w, ∂ℓ_i/∂w⟩/n: H is the identity, at the end or summed over checkpoints.

    The products with all rows' gradients are one difference of the rows' losses along ∂Φ/∂w, by
    two forward passes over the training rows. TracIn (Pruthi et al. 2020, arXiv:2002.08484, Eq. 2)
    sums over ``checkpoints`` points of the run, each times its learning rate.

    Args:
        cosine: divide by ‖∂Φ/∂w‖·‖∂ℓ_i/∂w‖; this takes a backward pass for each row.
        checkpoints: how many points of the run, in the middles of as many equal parts of it; 0 for
            the end alone.
    """

    cosine: bool = False
    checkpoints: int = 0
    product: ProductKind = field(default="difference", kw_only=True)
    name = "gradient"

    def check(self) -> None:
        """Check the ranges of the options."""
        super().check()
        self.require(self.checkpoints >= 0, f"checkpoints must be 0 or more: {self.checkpoints}")

    def cost(self) -> Cost | None:
        """Of one upper step: F, and the difference along ∂F/∂w."""
        return self.products_cost(0, 3)

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """b itself."""
        return Solution(b)


@dataclass(frozen=True)
class Method:
    """An estimator, and of a whole run the number of steps from the end, None for all."""

    estimator: Estimator
    last: int | None = None

    @property
    def whole_run(self) -> bool:
        """Whether steps of the run are differentiated."""
        return isinstance(self.estimator, Unrolled)

    @property
    def description(self) -> str:
        """The estimator with its options; of a whole run with the steps that it is truncated to."""
        if isinstance(self.estimator, Unrolled):
            options = repr(replace(self.estimator, steps=self.last or 1))
            return options if self.last else options.replace("steps=1", "steps='all'")
        return repr(self.estimator)

    @property
    def points(self) -> int | None:
        """How many points of the run are read; None where its steps are differentiated."""
        if self.whole_run:
            return None
        # Twice as many, so that one lies in the middle of each part of the run.
        return max(1, 2 * getattr(self.estimator, "checkpoints", 0))

    @classmethod
    def of(cls, given: str | Estimator) -> Method:
        """The method that ``given`` names.

        Raises:
            ProblemError: an unknown name or option, or an estimator that gives no score a row.
        """
        if isinstance(given, str) and given.partition(":")[0] == "gradient":
            return cls(with_options(Gradient, given.partition(":")[2]))
        estimator = get_estimator(given)
        if type(estimator) is Unrolled:
            named = isinstance(given, str) and "steps" in given
            last = estimator.steps if named or estimator.steps > 1 else None
            return cls(estimator, last)
        if not isinstance(estimator, Solver):
            raise ProblemError(
                f"method: {estimator.name} gives no score for each row; choose unrolled (the whole "
                "run), an implicit solver such as minres, nystrom or cg, or gradient"
            )
        return cls(estimator)


def measured(test: Any) -> Callable[[], Mapping[str, float]]:
    """A function that measures what ``test``, a function, returns: a loss or a mapping.

    Raises:
        ProblemError: ``test`` is no function.
    """
    if not callable(test):
        raise ProblemError("test: give a function that returns a loss or a mapping of numbers")

    @torch.no_grad()
    def measure() -> Mapping[str, float]:
        result = test()
        named = result if isinstance(result, Mapping) else {"loss": result}
        return {name: float(value) for name, value in named.items()}

    return measure


@dataclass(frozen=True)
class Setting:
    """A run, Φ, and the loss over all training rows at the run's end.

    Attributes:
        run: the training run.
        evaluation: Φ, by slice.
        shares: the share of each slice in the whole Φ.
        final: the level with the mean loss over all rows, over the run's variables.
        rows: its batch.
        measure: from test rows, a function that measures the model on them.
        probabilities: of a classifier with one class a row, a function from rows to the class
            probabilities.
        labels: likewise, the class of each row, ``(n,)``.
    """

    run: Run
    evaluation: Evaluation
    shares: dict[str, float]
    final: Problem
    rows: Callable[[], Any]
    measure: Callable[[Any], Callable[[], Mapping[str, float]]] = measured
    probabilities: Callable[[Sequence[int]], Tensor] | None = None
    labels: Tensor | None = None

    def value(self) -> dict[str, float]:
        """Φ of each slice at the current point."""
        return {name: self.evaluation.value(name) for name in self.evaluation.slices}

    def whole(self, by_slice: dict[str, Any]) -> Any:
        """The sum over the slices by their shares."""
        return sum(self.shares[name] * value for name, value in by_slice.items())


@dataclass
class Report:
    """What scores cost, and what a solver says of its solutions.

    Attributes:
        passes: forward+backward passes and second backward passes.
        residuals: of each slice, the solver's relative residual.
        notes: what the solver noted, such as negative curvature.
    """

    passes: Passes = field(default_factory=Passes)
    residuals: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def solved(self, name: str, result: Estimate) -> None:
        """Add the solution of the slice ``name``."""
        if result.residual is not None:
            self.residuals[name] = result.residual
        if result.note and result.note not in self.notes:
            self.notes.append(result.note)


def scores(
    setting: Setting, method: Method, checkpoints: Checkpoints, *, progress: bool = False
) -> tuple[dict[str, Tensor], Report]:
    """dΦ/dv of each slice, ``(n,)`` in float64, at the current end of the run; and its cost.

    Args:
        setting: the run and Φ.
        method: how.
        checkpoints: those of the run that led to the current point.
        progress: whether to show a progress bar.

    Raises:
        NonFiniteError: a loss, a gradient, a curvature or a score is NaN or infinite.
    """
    report = Report()
    if method.whole_run:
        found = _whole_run(setting, method, checkpoints, report, progress)
    elif isinstance(method.estimator, Gradient) and method.estimator.checkpoints:
        found = _along_the_run(setting, method.estimator, checkpoints, report)
    else:
        found = _at_the_end(setting, method.estimator, setting.rows(), report)
    return {name: vector.flat().to("cpu", torch.float64) for name, vector in found.items()}, report


def _oracle(setting: Setting, level: Problem, slice_: Any, rows: Any, passes: Passes) -> Oracle:
    fixed = RandomState.seeded(level.devices, "attribution")
    return Oracle(setting.evaluation, level, slice_, rows, fixed, fixed, passes=passes)


def _whole_run(
    setting: Setting, method: Method, checkpoints: Checkpoints, report: Report, progress: bool
) -> dict[str, Vector]:
    run, adjoints = setting.run, []
    assert isinstance(method.estimator, Unrolled)
    everything = Problem([(str(k), v) for k, v in enumerate(run.variables)], name="the run")
    for parts in setting.evaluation.slices.values():
        oracle = _oracle(setting, everything, parts, None, report.passes)
        with oracle.open():
            adjoints.append(oracle.upper_gradient.b.parts)
    sweep = Sweep(run, adjoints, report.passes, method.estimator.product)
    found = sweep.back(checkpoints, last=method.last, progress=progress)
    return {name: Vector([s]) for name, s in zip(setting.evaluation.slices, found, strict=True)}


def _at_the_end(
    setting: Setting, estimator: Estimator, rows: Sequence[Any], report: Report
) -> dict[str, Vector]:
    found = {}
    cosine = isinstance(estimator, Gradient) and estimator.cosine
    norms = Vector([_norms(setting, rows, report.passes)]) if cosine else None
    for name, parts in setting.evaluation.slices.items():
        oracle = _oracle(setting, setting.final, parts, rows, report.passes)
        result = estimate(oracle, estimator)
        report.solved(name, result)
        found[name] = result.implicit
        if norms is not None:
            length = oracle.upper_gradient.norm
            found[name] = found[name] * norms * (1 / length if length else 0.0)
    return found


def _along_the_run(
    setting: Setting, estimator: Gradient, checkpoints: Checkpoints, report: Report
) -> dict[str, Vector]:
    run, rows = setting.run, setting.rows()
    total: dict[str, Vector] = {}
    kept, count = range(0, len(run.steps), checkpoints.every), estimator.checkpoints
    chosen = [kept[(2 * k + 1) * len(kept) // (2 * count)] for k in range(count)]
    with perturbed(run.variables):
        for number in dict.fromkeys(chosen):
            assign_(run.variables, checkpoints.get(number)[0])
            rate = float(run.steps[number].moves[0].optimizer["groups"][0]["lr"])
            for name, vector in _at_the_end(setting, estimator, rows, report).items():
                total[name] = total[name] + rate * vector if name in total else rate * vector
    return total


def _norms(setting: Setting, rows: Sequence[Any], passes: Passes) -> Tensor:
    """1/‖∂f/∂w of row i‖, ``(n,)``, by a backward pass for each row; 0 for a row without one."""
    level, weights = setting.final, setting.evaluation.variables[0]
    found = torch.zeros_like(weights)
    for part in rows:
        loss, _ = level.evaluate([part])
        (shares,) = torch.autograd.grad(loss, [weights], create_graph=True)
        for row in shares.detach().nonzero().flatten().tolist():
            gradient = torch.autograd.grad(
                shares[row], level.variables, retain_graph=True, allow_unused=True
            )
            passes.products += 1
            norm = Vector.of(gradient, level.variables).norm() / len(rows)
            found[row] = 1 / norm if norm else 0.0
    return found
