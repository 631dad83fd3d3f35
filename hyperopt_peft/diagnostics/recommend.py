"""Which estimator to use, from a comparison of them: a rule, and its reasons in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperopt_peft.diagnostics.compare import Record
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import DARTS, Comparison, get_estimator


@dataclass(frozen=True)
class Thresholds:
    """What an estimate must keep to, against the reference.

    Attributes:
        cosine: at least this.
        relative_error: at most this.
        residual: at most this, of the reference itself.
        ratio: of norms; beyond it, or below its inverse, an estimate is too long or too short.
    """

    cosine: float = 0.95
    relative_error: float = 0.3
    residual: float = 0.1
    ratio: float = 2.0

    def __post_init__(self) -> None:
        if not -1 <= self.cosine <= 1:
            raise ProblemError(f"min_cosine must be in [-1, 1], got {self.cosine}")
        for name in ("relative_error", "residual"):
            if getattr(self, name) <= 0:
                raise ProblemError(f"max_{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Recommendation:
    """``method`` is what to use, None where no estimator is close enough; ``reasons`` say why."""

    method: str | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.reasons)


def recommend(comparison: Comparison, limits: Thresholds | None = None) -> Recommendation:
    """The quickest estimator within ``limits``.

    A reference that did not converge, estimates of the wrong length and estimators without a
    number are warned of, whatever is recommended.
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
            f"Use {best.method}: of {len(near)} within {bounds} it is the quickest, "
            f"{best.seconds:.3g} s (cosine {best.cosine:.3f}, relative error "
            f"{best.relative_error:.2g})."
        )
        if best.method.partition(":")[0] == "direct":
            reasons.append(
                "The implicit term is small here: the upper level may as well be trained without "
                "it, at the cost of one pass."
            )
    elif rows:
        closest = min(rows, key=lambda row: row.relative_error)
        reasons.append(
            f"None is within {bounds}; the closest is {closest.method} (cosine "
            f"{closest.cosine:.3f}, relative error {closest.relative_error:.2g}): give it more "
            f"steps or terms, or use the reference, {comparison.reference}."
        )
    else:
        reasons.append("No estimator gave a number that can be compared.")
    reasons += [text for row in rows for text in _of_length(row, limits)]
    reasons += [
        f"{row.method} gave no number: {row.problem}" for row in comparison.rows if row.problem
    ]
    return Recommendation(None if best is None else best.method, tuple(reasons))


def _of_reference(comparison: Comparison, limits: Thresholds) -> list[str]:
    warnings = []
    residual = comparison.reference_residual
    if residual is not None and not residual <= limits.residual:
        warnings.append(
            f"Warning: the reference is itself far from the solution, residual {residual:.3g} > "
            f"{limits.residual:g}, so what follows is uncertain; raise reference_steps or damping."
        )
    if comparison.reference_note:
        warnings.append(
            f"Warning: the reference met {comparison.reference_note}; raise damping beyond it."
        )
    return warnings


def _of_length(row: Record, limits: Thresholds) -> list[str]:
    """Too long is wrong for all; too short only where the length is a choice, not a few steps."""
    darts = row.method.partition(":")[0] == "darts"
    long = row.norm_ratio > limits.ratio
    if not long and not (darts and row.norm_ratio < 1 / limits.ratio):
        return []
    how = f"{row.norm_ratio:.2g} times as long as the reference"
    if not darts:
        return [f"Warning: {row.method} is {how}."]
    estimator = get_estimator(row.method)
    assert isinstance(estimator, DARTS)
    return [
        f"Warning: {row.method} is {how}; its length is a choice, ξ = {estimator.xi}: "
        f"{'lower' if long else 'raise'} xi."
    ]
