"""Which estimator is recommended, and what is warned of: every branch of the rule."""

import math

import pytest

from hyperopt_peft.diagnostics.compare import ComparisonRow, EstimatorComparison
from hyperopt_peft.diagnostics.recommend import recommend


def row(method, cosine=0.99, error=0.1, seconds=1.0, problem="", factor=math.nan):
    return ComparisonRow(method, cosine, error, 1.0, factor, seconds=seconds, problem=problem)


def comparison(*rows, residual=0.01, note="", reference="minres:steps=40"):
    return EstimatorComparison(reference, residual, note, 3, rows)


NAN = math.nan
BROKEN = row("exact", seconds=0.0, problem="too many unknowns")
QUICK = row("cg", seconds=0.4), row("minres", seconds=0.3)
ROUGH = [row("darts", cosine=0.6, seconds=0.1), row("neumann", error=0.5, seconds=0.2)]


@pytest.mark.parametrize(
    ("rows", "estimator", "reason"),
    [
        (
            [*ROUGH, *QUICK],
            "minres",
            "Use minres: it is the fastest of 2 within cosine ≥ 0.95 and relative error ≤",
        ),
        ([row("direct", seconds=0.1), row("cg")], "direct", "implicit term is small"),
        (ROUGH, None, "the closest is darts (cosine 0.600, relative error 0.1)"),
        ([BROKEN, row("cg")], "cg", "exact gave no result: too many unknowns"),
        ([BROKEN, row("direct", cosine=NAN)], None, "No estimator gave a result"),
    ],
)
def test_the_quickest_within_both_thresholds(rows, estimator, reason):
    result = recommend(comparison(*rows))
    assert result.estimator == estimator and reason in str(result)


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"residual": 0.2}, "reference is uncertain (residual"),
        ({"residual": NAN}, "reference is uncertain (residual"),
        (
            {"residual": 0.2, "note": "10% beyond", "reference": "retraining:lr=0.1"},
            "relative error 0.2 > 0.1), as is this recommendation; raise its steps or lr",
        ),
        ({"note": "negative curvature -3"}, "negative curvature -3"),
        ({"residual": 0.1}, None),
        ({"residual": None}, None),
    ],
)
def test_a_doubtful_reference_is_warned_of_first(options, warning):
    first, *others = recommend(comparison(row("cg"), **options)).reasons
    assert len(others) == (warning is not None) and (warning or "Use cg") in first


@pytest.mark.parametrize(
    ("xi", "factor", "reason"),
    [("0.7", 0.1, "ξ = 0.07"), ("0.7", -0.1, "no ξ"), ("0.7", NAN, "Use"), ("lr", 0.5, "Use")],
)
def test_the_xi_of_darts_that_is_closest_to_the_reference(xi, factor, reason):
    rows = row("cg"), row(f"darts:xi={xi}", 0.4, 3, factor=factor)
    assert reason in recommend(comparison(*rows)).reasons[-1]
