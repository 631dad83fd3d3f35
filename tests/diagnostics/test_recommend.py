"""Which estimator is recommended, and what is warned of: every branch of the rule."""

import math

import pytest

from hyperopt_peft.diagnostics.compare import Comparison, ComparisonRow
from hyperopt_peft.diagnostics.recommend import recommend


def row(method, cosine=0.99, error=0.1, seconds=1.0, problem="", factor=math.nan):
    return ComparisonRow(method, cosine, error, 1.0, factor, seconds=seconds, problem=problem)


def comparison(*rows, residual=0.01, note="", reference="minres:steps=40"):
    return Comparison(reference, residual, note, 3, rows)


def test_the_quickest_within_both_thresholds():
    result = recommend(
        comparison(
            row("darts", cosine=0.6, seconds=0.1),
            row("neumann", error=0.5, seconds=0.2),
            row("cg", seconds=0.4),
            row("minres", seconds=0.3),
        )
    )
    assert result.estimator == "minres"
    (reason,) = result.reasons
    assert reason.startswith(
        "Use minres: of 2 within cosine ≥ 0.95 and relative error ≤ 0.3 it is the quickest, 0.3 s"
    )


def test_direct_alone_says_that_the_implicit_term_is_small():
    result = recommend(comparison(row("direct", seconds=0.1), row("cg")))
    assert result.estimator == "direct"
    assert "implicit term is small" in result.reasons[1]


def test_none_is_close_enough():
    result = recommend(comparison(row("darts", 0.3, 0.95), row("cg", 0.5, 0.9)))
    assert result.estimator is None
    assert "the closest is cg (cosine 0.500, relative error 0.9)" in str(result)
    assert "use the reference, minres:steps=40" in str(result)


def test_estimators_without_a_number_are_named_and_never_chosen():
    broken = row("exact", seconds=0.0, problem="too many unknowns")
    result = recommend(comparison(broken, row("cg")))
    assert result.estimator == "cg"
    assert result.reasons[-1] == "exact gave no number: too many unknowns"
    alone = recommend(comparison(broken, row("direct", cosine=float("nan"))))
    assert alone.estimator is None
    assert alone.reasons[0] == "No estimator gave a number that can be compared."


@pytest.mark.parametrize("residual", [0.2, float("nan")])
def test_a_reference_that_did_not_converge_is_warned_of_first(residual):
    result = recommend(comparison(row("cg"), residual=residual))
    assert result.estimator == "cg"
    assert "reference is itself uncertain, residual" in result.reasons[0]


def test_a_retraining_that_is_too_rough_is_warned_of_and_its_note_is_none():
    rough = comparison(row("cg"), residual=0.2, note="10% beyond", reference="retraining:lr=0.1")
    (warning, _) = recommend(rough).reasons
    assert "relative error 0.2 > 0.1" in warning and "lr" in warning


@pytest.mark.parametrize("residual", [0.1, None])
def test_a_reference_that_converged_or_is_exact_is_not(residual):
    assert len(recommend(comparison(row("cg"), residual=residual)).reasons) == 1


def test_negative_curvature_of_the_reference_is_told():
    result = recommend(comparison(row("cg"), note="negative curvature -3"))
    assert "negative curvature -3" in result.reasons[0]


@pytest.mark.parametrize(("factor", "xi"), [(0.1, 0.07), (-0.1, 0.0), (math.nan, None)])
def test_the_xi_of_darts_that_is_closest_to_the_reference(factor, xi):
    rows = row("cg"), row("darts:xi=0.7", 0.4, 3, factor=factor)
    result = recommend(comparison(*rows))
    assert result.xi == (None if xi is None else pytest.approx(xi))
    assert ("ξ" in result.reasons[-1]) == (xi is not None)


def test_the_xi_of_a_rate_is_no_number():
    assert recommend(comparison(row("darts:xi=lr", factor=0.5))).xi is None
