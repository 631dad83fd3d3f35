"""No estimator is silently wrong on problems that nobody chose."""

import pytest

from hyperopt_peft.hypergradients.products import ExactProduct
from tests.support.fuzz.run import Examination, report, run

PARTS = 10
PROBLEMS = 300


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_estimator_is_right_or_warns_or_refuses(part: int) -> None:
    each = PROBLEMS // PARTS
    verdicts = list(run(range(part * each, (part + 1) * each)))
    assert not any(verdict.fault for verdict in verdicts), report(verdicts)


def test_a_curvature_that_changes_within_a_difference_is_right_or_warned() -> None:
    """Seeds that were wrong once."""
    verdicts = list(run([1234000051]))
    assert not any(verdict.fault for verdict in verdicts), report(verdicts)


def test_a_product_that_is_a_tenth_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    along = ExactProduct._along
    monkeypatch.setattr(ExactProduct, "_along", lambda *args: 1.1 * along(*args))
    verdicts = list(Examination(1).verdicts())
    wrong = {verdict.estimator for verdict in verdicts if verdict.kind == "WRONG"}
    assert any(name.startswith("unrolled") for name in wrong), report(verdicts)
