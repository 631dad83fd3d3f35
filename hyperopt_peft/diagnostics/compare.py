"""Estimators side by side on the user's own problem."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.diagnostics.memory import peak_memory
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import check_estimator, estimate, open_oracle
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.utils.vector import Vector, dot


@dataclass(frozen=True)
class Record:
    """How one estimator did, medians over the repeats.

    ``cosine``, ``relative_error`` and ``norm_ratio`` are against the reference on the same
    batches and random numbers; ``residual`` is the largest of the solver's own, ‖b − Hv‖/‖b‖;
    ``spread`` is the standard deviation of the estimate over the repeats, relative to its mean;
    ``gradients`` and ``products`` count forward+backward passes and second backward passes;
    ``peak_memory`` is in bytes, above what was held before. ``note`` is what the estimator said
    of its own work first, for example that it met negative curvature; ``problem`` says why it
    gave no number.
    """

    method: str
    cosine: float = float("nan")
    relative_error: float = float("nan")
    norm_ratio: float = float("nan")
    residual: float | None = None
    spread: float = float("nan")
    gradients: int = 0
    products: int = 0
    seconds: float = float("nan")
    peak_memory: int = 0
    note: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Comparison:
    """A table of `Record`s; ``print`` it, or take ``records()``.

    ``reference_residual`` says how far the reference itself can be trusted: it is the largest
    residual of its solves, None where it has none; ``reference_note`` is what its solver noted.
    """

    reference: str
    reference_residual: float | None
    reference_note: str
    repeats: int
    rows: tuple[Record, ...]

    def records(self) -> list[dict[str, Any]]:
        """One plain dict for each method."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        head = ("method", "cosine", "rel. error", "norm ratio", "residual", "spread")
        table: list[tuple[str, ...]] = [(*head, "fwd+bwd", "products", "seconds", "MB")]
        for row in self.rows:
            numbers = (
                _cell(row.cosine, ".4f"),  # none where an estimate is zero
                _cell(row.relative_error, ".2g"),
                _cell(row.norm_ratio, ".3f"),
                _cell(row.residual, ".2g"),
                _cell(row.spread, ".2g"),
            )
            cost = (str(row.gradients), str(row.products), f"{row.seconds:.3g}")
            cells = (*numbers, *cost, f"{row.peak_memory / 2**20:.1f}")
            table.append((row.method, *cells) if not row.problem else (row.method, row.problem))
        widths = [max(len(row[i]) for row in table if len(row) > 2) for i in range(len(table[0]))]
        widths[0] = max(len(r[0]) for r in table)
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 or len(row) == 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in table
        ]
        lines += [f"{row.method}: {row.note}" for row in self.rows if row.note]
        known = self.reference_residual
        accuracy = "" if known is None else f" (residual {known:.2g})"
        note = f" ({self.reference_note})" if self.reference_note else ""
        lines.append(f"against {self.reference}{accuracy}{note}; {self.repeats} repeats")
        return "\n".join(lines)


def compare_hypergradients(
    upper: Problem,
    lower: Problem,
    methods: str | Estimator | Iterable[str | Estimator],
    reference: str | Estimator = "exact",
    repeats: int = 3,
    seed: int = 0,
) -> Comparison:
    """Run ``methods`` at the current point and compare each with ``reference``.

    Each repeat draws new random numbers (dropout masks), the same for every method; the
    batches are those that the levels' data will give next. Nothing is trained or changed.

    Args:
        methods: names with options, or estimators; one of them or several.
        reference: what is taken for the truth: ``"exact"`` (up to 5,000 lower unknowns), or a
            long solve such as ``"cg:steps=200,tolerance=1e-10"``.
        repeats: how often; medians are reported.
        seed: of the random numbers.

    Raises:
        ProblemError: an unknown method, no methods, or ``repeats`` below 1.
        NonFiniteError: the reference is not finite.
    """
    if isinstance(methods, str | Estimator):
        methods = [methods]
    chosen = [(m if isinstance(m, str) else repr(m), get_estimator(m)) for m in methods]
    if not chosen or repeats < 1:
        raise ProblemError("compare_hypergradients needs at least one method and one repeat")
    truth = get_estimator(reference)
    exact = [_run(upper, lower, truth, seed + k) for k in range(repeats)]
    truths = [run.hypergradient for run in exact]
    rows = [_record(upper, lower, name, estimator, truths, seed) for name, estimator in chosen]
    name = reference if isinstance(reference, str) else repr(truth)
    note = _first_note(exact)
    return Comparison(name, _largest_residual(exact), note, repeats, tuple(rows))


@dataclass(frozen=True)
class _Run:
    hypergradient: Vector
    residual: float | None
    note: str
    gradients: int
    products: int
    seconds: float


def _run(upper: Problem, lower: Problem, estimator: Estimator, seed: int) -> _Run:
    oracle = open_oracle(upper, lower, seed=seed)
    begin = time.perf_counter()
    check_estimator(estimator, oracle.upper, oracle.lower)
    result = estimate(oracle, estimator)
    for device in {*upper.devices, *lower.devices}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    passes = oracle.passes
    counts = passes.gradients, passes.products
    return _Run(result.hypergradient, result.residual, result.note, *counts, seconds)


def _record(
    upper: Problem,
    lower: Problem,
    name: str,
    estimator: Estimator,
    truths: Sequence[Vector],
    seed: int,
) -> Record:
    try:
        runs = [_run(upper, lower, estimator, seed + k) for k in range(len(truths))]
        memory = peak_memory(lambda: _run(upper, lower, estimator, seed), upper.devices[0])
    except (ProblemError, NonFiniteError) as error:
        return Record(name, problem=str(error))
    estimates = [run.hypergradient for run in runs]
    mean = sum(estimates[1:], start=estimates[0]) / len(estimates)
    variance = statistics.fmean((h - mean).norm() ** 2 for h in estimates)

    def median(measure: Callable[[Vector, Vector], float]) -> float:
        return statistics.median(measure(h, t) for h, t in zip(estimates, truths, strict=True))

    return Record(
        name,
        cosine=median(lambda h, t: _ratio(dot(h, t), h.norm() * t.norm())),
        relative_error=median(lambda h, t: _ratio((h - t).norm(), t.norm())),
        norm_ratio=median(lambda h, t: _ratio(h.norm(), t.norm())),
        residual=_largest_residual(runs),
        spread=_ratio(variance**0.5, mean.norm()),
        gradients=runs[0].gradients,
        products=runs[0].products,
        seconds=statistics.median(run.seconds for run in runs),
        peak_memory=memory,
        note=_first_note(runs),
    )


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{form}}"


def _first_note(runs: Sequence[_Run]) -> str:
    return next((run.note for run in runs if run.note), "")


def _largest_residual(runs: Sequence[_Run]) -> float | None:
    return max((run.residual for run in runs if run.residual is not None), default=None)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
