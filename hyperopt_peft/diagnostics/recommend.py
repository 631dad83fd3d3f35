"""A recommended estimator from a comparison, with reasons in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperopt_peft.diagnostics.compare import Comparison, ComparisonRow, option
from hyperopt_peft.diagnostics.retraining import Retraining
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import get_estimator, registered


@dataclass(frozen=True)
class Thresholds:
    """The limits of an acceptable estimate; see `ComparisonRow`.

    Attributes:
        cosine: the smallest cosine.
        relative_error: the largest relative error.
        residual: the largest residual of the reference.
        ratio: the largest norm ratio; its inverse is the smallest.
    """

    cosine: float = 0.95
    relative_error: float = 0.3
    residual: float = 0.1
    ratio: float = 2.0

    def __post_init__(self) -> None:
        if not -1 <= self.cosine <= 1:
            raise ProblemError(f"min_cosine: must be in [-1, 1], got {self.cosine}")
        for name in ("relative_error", "residual"):
            if getattr(self, name) <= 0:
                raise ProblemError(f"max_{name}: must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Recommendation:
    """The recommended ``estimator``, None if none is within the limits, and the ``reasons``.

    ``xi`` is the ξ ≥ 0 at which ``darts`` is closest to the reference; None without ``darts``.
    """

    estimator: str | None
    reasons: tuple[str, ...]
    xi: float | None = None

    def __str__(self) -> str:
        return "\n".join(self.reasons)


def recommend(comparison: Comparison, limits: Thresholds | None = None) -> Recommendation:
    """The fastest estimator within ``limits``.

    The reasons include warnings of a reference that did not converge, estimates of wrong norm, a
    damping that dominates the Hessian, and estimators without a result. The ξ of ``darts`` is the
    least-squares one: ξ = ⟨d, t − e⟩/⟨d, d⟩, with the direct term e, the implicit term d at ξ = 1
    and the reference t.

    Example:
        >>> from hyperopt_peft import compare_hypergradients
        >>> from hyperopt_peft.engine import minimize
        >>> from hyperopt_peft.diagnostics import recommend
        >>> from hyperopt_peft.problems.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> _ = minimize(lower)
        >>> table = compare_hypergradients(upper, lower, ["darts", "cg"], progress=False)
        >>> recommend(table).estimator
        'cg'
    """
    limits = limits or Thresholds()
    reasons = [*_of_reference(comparison, limits)]
    rows = [row for row in comparison.rows if not row.problem and math.isfinite(row.cosine)]
    near = [
        row
        for row in rows
        if row.cosine >= limits.cosine and row.relative_error <= limits.relative_error
    ]
    bounds = f"cosine ≥ {limits.cosine:g} and relative error ≤ {limits.relative_error:g}"
    best = min(near, key=lambda row: row.seconds) if near else None
    if best is not None:
        reasons.append(
            f"Use {best.estimator}: of {len(near)} within {bounds} it is the quickest, "
            f"{best.seconds:.3g} s (cosine {best.cosine:.3f}, relative error "
            f"{best.relative_error:.2g})."
        )
        if best.estimator.partition(":")[0] == "direct":
            reasons.append(
                "The implicit term is small here: the upper level may as well be trained without "
                "it, at the cost of one pass."
            )
    elif rows:
        closest = min(rows, key=lambda row: row.relative_error)
        reasons.append(
            f"None is within {bounds}; the closest is {closest.estimator} (cosine "
            f"{closest.cosine:.3f}, relative error {closest.relative_error:.2g}): give it more "
            f"steps or terms, or use the reference, {comparison.reference}."
        )
    else:
        reasons.append("No estimator gave a number that can be compared.")
    reasons += [text for row in rows for text in _of_length(row, limits)]
    reasons += [
        f"Warning: {row.estimator}: {row.note}."
        for row in rows
        if comparison.spectrum and comparison.spectrum.dominated_by(_option(row, "damping") or 0.0)
    ]
    xi = next((best_xi for row in rows if (best_xi := _best_xi(row)) is not None), None)
    if xi is not None:
        reasons.append(
            f"darts comes closest to the reference with ξ = {xi:.2g}."
            if xi > 0
            else "The implicit term of darts points away from the reference: no ξ above 0 is "
            "better than direct."
        )
    reasons += [
        f"{row.estimator} gave no number: {row.problem}" for row in comparison.rows if row.problem
    ]
    return Recommendation(None if best is None else best.estimator, tuple(reasons), xi)


def _of_reference(comparison: Comparison, limits: Thresholds) -> list[str]:
    warnings = []
    residual, name = comparison.reference_residual, comparison.reference.partition(":")[0]
    if residual is not None and not residual <= limits.residual:
        of, advice = "residual", "raise its steps or its damping"
        if name == Retraining.name:
            of, advice = "relative error", "raise its steps or lr, or set its epsilon"
        warnings.append(
            f"Warning: the reference is itself uncertain, {of} {residual:.3g} > "
            f"{limits.residual:g}, and so is what follows; {advice}."
        )
    if comparison.reference_note and name != Retraining.name:
        warnings.append(f"Warning: of the reference: {comparison.reference_note}.")
    return warnings


def _of_length(row: ComparisonRow, limits: Thresholds) -> list[str]:
    """A warning of a wrong norm. A small norm is a warning for ``darts`` only, where ξ sets it."""
    long = row.norm_ratio > limits.ratio
    if long or (_xi(row) is not None and row.norm_ratio < 1 / limits.ratio):
        return [f"Warning: {row.estimator} is {row.norm_ratio:.2g} times as long as the reference."]
    return []


def _option(row: ComparisonRow, name: str) -> float | None:
    """The value of a numeric option of the row's estimator; None if it has no such option."""
    has_name = row.estimator.partition(":")[0] in registered()
    return option(get_estimator(row.estimator), name) if has_name else None


def _xi(row: ComparisonRow) -> float | None:
    return _option(row, "xi") if row.estimator.partition(":")[0] == "darts" else None


def _best_xi(row: ComparisonRow) -> float | None:
    xi = _xi(row)
    return None if xi is None or math.isnan(row.factor) else max(0.0, xi * row.factor)
