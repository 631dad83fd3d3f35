"""A recommended estimator from a comparison, with reasons in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperopt_peft.diagnostics.compare import ComparisonRow, EstimatorComparison
from hyperopt_peft.hypergradients import get_estimator

# The limits of an acceptable estimate, and of its reference; see `ComparisonRow`.
MIN_COSINE = 0.95
MAX_RELATIVE_ERROR = 0.3
MAX_RESIDUAL = 0.1


@dataclass(frozen=True)
class Recommendation:
    """The recommended estimator, None if none is close enough, and the reasons."""

    estimator: str | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.reasons)


def recommend(comparison: EstimatorComparison) -> Recommendation:
    """The fastest estimator with a cosine of at least 0.95 and a relative error of at most 0.3.

    The reasons warn of a reference that did not converge, and name estimators without a result and
    the ξ of ``darts`` with the least squared error, `ComparisonRow.factor` times the ξ it had.

    Example:
        >>> from hyperopt_peft import compare_hypergradients
        >>> from hyperopt_peft.engine import minimize
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> _ = minimize(lower)
        >>> table = compare_hypergradients(upper, lower, ["darts", "cg"], progress=False)
        >>> recommend(table).estimator
        'cg'
    """
    reasons = _of_reference(comparison)
    rows = [row for row in comparison.rows if not row.problem and math.isfinite(row.cosine)]
    near = [
        row for row in rows if row.cosine >= MIN_COSINE and row.relative_error <= MAX_RELATIVE_ERROR
    ]
    bounds = f"cosine ≥ {MIN_COSINE} and relative error ≤ {MAX_RELATIVE_ERROR}"
    best = min(near, key=lambda row: row.seconds, default=None)
    if best is not None:
        reasons.append(
            f"Use {best.estimator}: it is the fastest of {len(near)} within {bounds}, "
            f"{best.seconds:.3g} s ({_errors(best)})."
        )
        if best.estimator.partition(":")[0] == "direct":
            reasons.append(
                "The implicit term is small here: direct omits it, at the cost of one pass."
            )
    elif rows:
        closest = min(rows, key=lambda row: row.relative_error)
        reasons.append(
            f"None is within {bounds}; the closest is {closest.estimator} ({_errors(closest)}): "
            f"give it more steps or terms, or use the reference, {comparison.reference}."
        )
    else:
        reasons.append("No estimator gave a result to compare.")
    xi = next((row.factor * xi for row in rows if (xi := _xi(row)) is not None), math.nan)
    if not math.isnan(xi):
        reasons.append(
            f"darts comes closest to the reference with ξ = {xi:.2g}."
            if xi > 0
            else "The implicit term of darts points away from the reference: no ξ above 0 is "
            "better than direct."
        )
    reasons += [
        f"{row.estimator} gave no result: {row.problem}" for row in comparison.rows if row.problem
    ]
    return Recommendation(None if best is None else best.estimator, tuple(reasons))


def _errors(row: ComparisonRow) -> str:
    return f"cosine {row.cosine:.3f}, relative error {row.relative_error:.2g}"


def _of_reference(comparison: EstimatorComparison) -> list[str]:
    """Warnings about the reference."""
    warnings, residual = [], comparison.reference_residual
    if residual is not None and not residual <= MAX_RESIDUAL:
        warnings.append(
            f"Warning: the reference is uncertain (residual {residual:.3g} > {MAX_RESIDUAL}), as "
            "is this recommendation; raise its steps or its damping."
        )
    if comparison.reference_note:
        warnings.append(f"Warning: the reference reports: {comparison.reference_note}.")
    return warnings


def _xi(row: ComparisonRow) -> float | None:
    """The ξ of the row's estimator, if it is darts with a numeric ξ."""
    if row.estimator.partition(":")[0] != "darts":
        return None
    xi = vars(get_estimator(row.estimator))["xi"]
    return None if xi == "lr" else float(xi)
