"""Comparisons of estimators on one problem."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import NEXT, check_estimator, open_oracle
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.implicit.exact import LARGEST
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.products import Passes
from hyperopt_peft.hypergradients.registry import EstimatorLike, get_estimator
from hyperopt_peft.utils.tables import aligned
from hyperopt_peft.utils.vector import Vector, dot


@dataclass(frozen=True)
class ComparisonRow:
    """One estimator in an `EstimatorComparison`, with medians over the repeats.

    Attributes:
        estimator: the name with options.
        cosine, relative_error, norm_ratio: ⟨h, t⟩/(‖h‖‖t‖), ‖h − t‖/‖t‖ and ‖h‖/‖t‖ for the
            estimate h and the reference t, with equal batches and random numbers.
        factor: the least-squares factor for the implicit term: ``darts`` has its smallest error at
            ``factor``·ξ.
        residual: the largest ‖b − Hv‖/‖b‖ of the solver.
        spread: the standard deviation of h over the repeats, divided by the norm of the mean.
        gradients, products: the numbers of forward+backward and of second backward passes.
        seconds: the time of one estimate.
        note: the first note, for example on negative curvature.
        problem: the error of an estimator without a result.
    """

    estimator: str
    cosine: float = float("nan")
    relative_error: float = float("nan")
    norm_ratio: float = float("nan")
    factor: float = float("nan")
    residual: float | None = None
    spread: float = float("nan")
    gradients: int = 0
    products: int = 0
    seconds: float = float("nan")
    note: str = ""
    problem: str = ""


#: Fields of a row, with their heads and formats in the table.
COLUMNS = (
    ("cosine", "cosine", ".4f"),  # NaN for a zero estimate
    ("relative_error", "rel. error", ".2g"),
    ("norm_ratio", "norm ratio", ".3f"),
    ("factor", "factor", ".2g"),
    ("residual", "residual", ".2g"),
    ("spread", "spread", ".2g"),
    ("gradients", "fwd+bwd", "d"),
    ("products", "products", "d"),
    ("seconds", "seconds", ".3g"),
)


@dataclass(frozen=True)
class EstimatorComparison:
    """A table of `ComparisonRow`s, to print or to read with ``records()``.

    ``reference_residual`` is the largest residual of the reference's solves, None if unknown;
    ``reference_note`` is its note.
    """

    reference: str
    reference_residual: float | None
    reference_note: str
    repeats: int
    rows: tuple[ComparisonRow, ...]

    def records(self) -> list[dict[str, Any]]:
        """One plain dict for each estimator."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        table = [("estimator", *(head for _, head, _ in COLUMNS))]
        for row in self.rows:
            cells = (_cell(getattr(row, name), form) for name, _, form in COLUMNS)
            table.append((row.estimator, *cells))
        notes = ((row.estimator, row.problem or row.note) for row in self.rows)
        lines = [f"{estimator}: {text}" for estimator, text in notes if text]
        residual = self.reference_residual
        accuracy = "" if residual is None else f" (residual {residual:.2g})"
        note = f" ({self.reference_note})" if self.reference_note else ""
        lines.append(f"against {self.reference}{accuracy}{note}; {self.repeats} repeats")
        return "\n".join([aligned(table), *lines])


def compare_hypergradients(
    upper: Problem,
    lower: Problem,
    estimators: EstimatorLike | Iterable[EstimatorLike],
    reference: EstimatorLike | None = None,
    repeats: int = 3,
    seed: int = 0,
    *,
    upper_batch: object = NEXT,
    lower_batch: object = NEXT,
    progress: bool = True,
) -> EstimatorComparison:
    """Compare the estimates of ``estimators`` at the current point with a reference.

    Each repeat has new random numbers (dropout masks), equal for all estimators. All state is
    restored afterwards.

    Args:
        estimators: an estimator, its name with options, a function ``(matvec, b) -> v``, or
            several of these.
        reference: an estimator; by default ``"exact"`` for up to 5,000 lower unknowns, otherwise
            ``"minres:steps=100"``.
        upper_batch, lower_batch: the batches; by default the next batch of each level's data.
            Levels for a Trainer have no data, and need batches.

    Raises:
        ProblemError: an estimator is unknown; no estimator is given; or ``repeats`` is below 1.
        NonFiniteError: the reference is not finite.

    Example:
        >>> from hyperopt_peft import compare_hypergradients
        >>> from hyperopt_peft.engine import minimize
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> _ = minimize(lower)
        >>> table = compare_hypergradients(upper, lower, ["darts", "cg"], progress=False)
        >>> [row.cosine > 0.999 for row in table.rows]
        [False, True]
    """
    if isinstance(estimators, str | Estimator) or callable(estimators):
        estimators = [estimators]
    chosen = [(_label(each), get_estimator(each)) for each in estimators]
    if not chosen or repeats < 1:
        raise ProblemError("estimators, repeats: give at least one estimator and one repeat")
    if reference is None:
        few = sum(variable.numel() for variable in lower.variables) <= LARGEST
        reference = "exact" if few else "minres:steps=100"
    truth = get_estimator(reference)
    batches = {"upper_batch": upper_batch, "lower_batch": lower_batch}

    def oracle(repeat: int) -> Oracle:
        return open_oracle(upper, lower, seed=seed + repeat, **batches)

    solved = [_run(oracle(k), truth) for k in range(repeats)]
    truths = [run.estimate.hypergradient for run in solved]

    def row(name: str, estimator: Estimator) -> ComparisonRow:
        try:
            runs = [_run(oracle(k), estimator) for k in range(repeats)]
        except (ProblemError, NonFiniteError) as error:
            return ComparisonRow(name, problem=str(error))
        return _row(name, runs, truths)

    rows = tuple(row(*each) for each in tqdm(chosen, desc="estimates", disable=not progress))
    residual, note = _largest_residual(solved), _first_note(solved)
    return EstimatorComparison(_label(reference), residual, note, repeats, rows)


def _label(estimator: EstimatorLike) -> str:
    return estimator if isinstance(estimator, str) else repr(get_estimator(estimator))


@dataclass(frozen=True)
class _Run:
    estimate: Estimate
    passes: Passes
    seconds: float


def _run(oracle: Oracle, estimator: Estimator) -> _Run:
    begin = time.perf_counter()
    check_estimator(estimator, oracle.upper, oracle.lower)
    result = oracle.estimate(estimator)
    for device in devices_of(oracle.upper, oracle.lower):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _Run(result, oracle.passes, time.perf_counter() - begin)


def _row(name: str, runs: Sequence[_Run], truths: Sequence[Vector]) -> ComparisonRow:
    estimates = [run.estimate.hypergradient for run in runs]
    mean = sum(estimates[1:], start=estimates[0]) / len(estimates)
    variance = statistics.fmean((h - mean).norm() ** 2 for h in estimates)

    def median(measure: Callable[[Vector, Vector], float]) -> float:
        return statistics.median(map(measure, estimates, truths))

    def factor(run: _Run, truth: Vector) -> float:
        direct, implicit = run.estimate.direct, run.estimate.implicit
        return _ratio(dot(implicit, truth - direct), dot(implicit, implicit))

    return ComparisonRow(
        name,
        cosine=median(lambda h, t: _ratio(dot(h, t), h.norm() * t.norm())),
        relative_error=median(lambda h, t: _ratio((h - t).norm(), t.norm())),
        norm_ratio=median(lambda h, t: _ratio(h.norm(), t.norm())),
        factor=statistics.median(map(factor, runs, truths)),
        residual=_largest_residual(runs),
        spread=_ratio(variance**0.5, mean.norm()),
        gradients=runs[0].passes.gradients,
        products=runs[0].passes.products,
        seconds=statistics.median(run.seconds for run in runs),
        note=_first_note(runs),
    )


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def _first_note(runs: Sequence[_Run]) -> str:
    return next((run.estimate.note for run in runs if run.estimate.note), "")


def _largest_residual(runs: Sequence[_Run]) -> float | None:
    residuals = (run.estimate.residual for run in runs)
    return max((residual for residual in residuals if residual is not None), default=None)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
