"""Estimators side by side: what the table says and counts."""

import math
from typing import Any

import pytest
import torch

from hyperopt_peft import ProblemError, compare_hypergradients, hypergradient
from hyperopt_peft.hypergradients import DARTS, open_oracle
from tests.support.cases import Case, cases, counted
from tests.support.networks import network_levels
from tests.support.quadratic import FunctionLevel, flat, program


def test_a_comparison_measures_against_the_reference() -> None:
    levels = program(0).levels()
    table = compare_hypergradients(*levels, ["exact", "direct", DARTS(xi=0.5)])
    assert table.reference_residual < 1e-10
    exact, direct, darts = table.records()
    truth = flat(hypergradient(*levels, "exact"))
    for record, method in ((direct, "direct"), (darts, DARTS(xi=0.5))):
        h = flat(hypergradient(*levels, method))
        assert record["cosine"] == pytest.approx(float(h @ truth / (h.norm() * truth.norm())))
        assert record["relative_error"] == pytest.approx(float((h - truth).norm() / truth.norm()))
        assert record["norm_ratio"] == pytest.approx(float(h.norm() / truth.norm()))
    assert (exact["cosine"], exact["norm_ratio"]) == (pytest.approx(1), pytest.approx(1))
    assert exact["relative_error"] < 1e-12 and exact["spread"] < 1e-12
    assert exact["residual"] < 1e-12 and direct["residual"] is None
    assert [r["estimator"] for r in table.records()] == ["exact", "direct", repr(DARTS(xi=0.5))]


@pytest.mark.parametrize(("largest", "name"), [(5000, "exact"), (3, "minres:steps=100")])
def test_the_default_reference(largest: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperopt_peft.diagnostics.compare.LARGEST", largest)
    table = compare_hypergradients(*program(0).levels(), ["cg"], repeats=1)
    assert f"against {name} (" in str(table) and table.rows[0].cosine > 0.99


def test_medians_and_spread_are_over_new_masks() -> None:
    """The masks of a repeat are a function of its seed, and the same for every method."""
    levels = network_levels(dropout=0.5)
    table = compare_hypergradients(*levels, ["direct"], "darts", repeats=5, seed=10)
    seeds = range(10, 15)
    actual = [flat(hypergradient(*levels, "direct", seed=k)).double() for k in seeds]
    truths = [flat(hypergradient(*levels, "darts", seed=k)).double() for k in seeds]
    errors = [float((h - t).norm() / t.norm()) for h, t in zip(actual, truths)]
    (record,) = table.records()
    assert record["relative_error"] == pytest.approx(sorted(errors)[2], rel=1e-4)
    mean = torch.stack(actual).mean(0)
    variance = torch.stack([(h - mean).norm() ** 2 for h in actual]).mean()
    assert record["spread"] == pytest.approx(float(variance.sqrt() / mean.norm()), rel=1e-4)
    assert record["spread"] > 0.01


def test_a_method_that_fails_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others keep their numbers."""
    levels = program(0).levels()
    monkeypatch.setattr("hyperopt_peft.hypergradients.implicit.exact.LARGEST", 3)
    methods = ["exact", "neumann:step_size=1e9,terms=200", "cg"]
    table = compare_hypergradients(*levels, methods, "minres:steps=40")
    too_large, diverging, fine = table.records()
    assert "unknowns" in too_large["problem"] and math.isnan(too_large["cosine"])
    assert "not finite" in diverging["problem"]
    assert fine["problem"] == "" and fine["cosine"] > 0.99
    assert too_large["problem"] in str(table)


def test_what_a_method_notes_is_below_the_table() -> None:
    """CG says where it met the negative curvature, and so why its row is what it is."""
    w, u = (torch.ones(2, requires_grad=True) for _ in range(2))
    upper = FunctionLevel(lambda _: w.square().sum(), [u])
    lower = FunctionLevel(lambda _: (w * u).square() @ torch.tensor([1.0, -2.0]), [w])
    table = compare_hypergradients(upper, lower, ["direct", "cg"], "minres", repeats=2)
    direct, cg = table.records()
    assert direct["note"] == "" and "curvature" in cg["note"]
    lines = str(table).splitlines()
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == f"cg: {cg['note']}"
    assert lines[1].split()[:3] == ["direct", "–", "1"]  # of length zero: no direction


def test_a_vanishing_reference_gives_no_numbers_and_no_error() -> None:
    w, u = (torch.ones(2, requires_grad=True) for _ in range(2))
    upper = FunctionLevel(lambda _: (u * 0).sum(), [u])
    lower = FunctionLevel(lambda _: (w - u).square().sum(), [w])
    (record,) = compare_hypergradients(upper, lower, ["cg"], "direct").records()
    assert all(math.isnan(record[key]) for key in ("cosine", "relative_error", "norm_ratio"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimators": []}, "estimator"),
        ({"estimators": ["cg"], "repeats": 0}, "repeat"),
        ({"estimators": ["cgg"]}, "'cgg'"),
        ({"estimators": ["cg"], "reference": "exakt"}, "'exakt'.*'exact'"),
        ({"estimators": ["cg"], "reference": "exact:size=3"}, "'size'"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        compare_hypergradients(*program(0).levels(), **arguments)


@cases()
def test_gradients_are_evaluations_of_losses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    upper, lower = program(0).levels()
    lower.evaluate(None)  # a level looks at its precision when it is first evaluated
    with counted(monkeypatch, (upper, "loss", "losses"), (lower, "loss", "losses")) as counts:
        open_oracle(upper, lower).estimate(case.estimator)  # without the check of exact products
    (record,) = compare_hypergradients(upper, lower, [case.estimator], "direct").records()
    assert record["gradients"] == counts["losses"]
