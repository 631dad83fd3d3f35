"""Neither an estimator nor the Trainer is silently wrong on problems that nobody chose."""

from dataclasses import replace
from typing import Any

import pytest

from hyperopt_peft.hypergradients.products import ExactProduct
from hyperopt_peft.trainer import tags, task_loss, upper_batches
from hyperopt_peft.trainer.step import OptimizerStep
from tests.support.fuzz.run import Examination, of_trainer, report, run
from tests.support.fuzz.trainer import Run

PARTS = 10
PROBLEMS = 300


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_verdict_is_right_or_warned_or_refused(part: int) -> None:
    each = PROBLEMS // PARTS
    verdicts = list(run(range(part * each, (part + 1) * each)))
    assert not any(verdict.fault for verdict in verdicts), report(verdicts)


def test_some_runs_of_the_trainer() -> None:
    verdicts = list(run(range(PROBLEMS, PROBLEMS + 40, 2)))
    assert not any(verdict.fault for verdict in verdicts), report(verdicts)


def test_a_curvature_that_changes_within_a_difference_is_right_or_warned() -> None:
    """Seeds that were wrong once, and two above 32 bits."""
    verdicts = list(run([1234000051, 4_295_000_000, 4_295_000_001]))
    assert not any(verdict.fault for verdict in verdicts), report(verdicts)


def test_a_product_that_is_a_tenth_too_large_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    along = ExactProduct._along
    monkeypatch.setattr(ExactProduct, "_along", lambda *args: 1.1 * along(*args))
    verdicts = list(Examination(1).verdicts())
    wrong = {verdict.estimator for verdict in verdicts if verdict.kind == "WRONG"}
    assert any(name.startswith("unrolled") for name in wrong), report(verdicts)


values, move, share = tags._values, OptimizerStep._move, upper_batches.UpperBatches._share
FAULTS: dict[str, Any] = {
    "tags of other rows": (tags, "_values", lambda *args: values(*args).flip(0)),
    "micro-batches that count alike": (task_loss, "label_weights", lambda x: [{}] * len(x)),
    "no clipping": (OptimizerStep, "_move", lambda *args: move(*args[:3], 0.0)),
    "a row that is read twice": (upper_batches.UpperBatches, "_share", lambda x, k: share(x, 0)),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_of_the_trainer_is_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"method": "sigmoid", "estimator": "sama", "count": 13, "accumulation": 2}
    words |= {"upper_batch": None, "collator": "pads", "loss": "mean", "smoothing": 0.0}
    words["batch"] = 2 if fault == "a row that is read twice" else 4  # several upper pieces
    form = replace(Run.draw(0), **words, clipping="both")
    if fault is not None:
        monkeypatch.setattr(*FAULTS[fault])
    assert of_trainer(form)[0] == ("right" if fault is None else "WRONG")
