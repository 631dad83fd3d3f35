"""An evaluation without each part of the test rows: closed forms, metrics, comparisons."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import Trainer, TrainingArguments

from hyperopt_peft.comparison.influence import PARTS, evaluate, influence, parts
from hyperopt_peft.comparison.result import Comparison
from hyperopt_peft.problems import LoRA
from hyperopt_peft.utils.verdict import Verdict
from tests.support.comparisons import accuracy, compared
from tests.support.trainers import base_model, data

ROWS = 120


@given(st.integers(1, 5000), st.integers(1, 600))
def test_a_part_is_whole_batches_and_there_are_at_most_fifty(count: int, most: int) -> None:
    size, batch = parts(count, most)
    assert batch <= most and size % batch == 0 and size * PARTS >= count
    assert size <= max(2 * math.ceil(count / PARTS), 1)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=40), st.integers(1, 9))
def test_of_a_mean_it_is_the_mean_of_the_part_minus_that_of_all(values: Any, size: int) -> None:
    values = np.array(values[: len(values) // size * size])
    if len(values) <= size:
        return
    found = influence(lambda x: {"mean": values[x].mean()}, len(values), size, {"mean": 0.0})
    expected = values.reshape(-1, size).mean(axis=1) - values.mean()
    assert found["mean"] == pytest.approx(expected, abs=1e-9)


def scores_of(outputs: Any) -> dict[str, float]:
    said, labels = outputs.predictions.argmax(-1), outputs.label_ids
    more = {"f1": f1_score(labels, said, average="macro"), "mcc": matthews_corrcoef(labels, said)}
    return {**accuracy(outputs), **more}


def trainer_of(folder: Path, measure: Any = scores_of, **arguments: Any) -> Any:
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, **arguments)
    return Trainer(base_model("classes"), args, compute_metrics=measure)


@pytest.mark.parametrize("batch", [8, 3, 64])
def test_scores_of_a_trainer_are_its_own_and_influences_those_of_rows(
    tmp_path: Path, batch: int
) -> None:
    rows = data("classes", ROWS, seed=5)
    options = {"per_device_eval_batch_size": batch}
    plain = trainer_of(tmp_path, **options)
    outputs = plain.predict(rows)
    logits, labels = outputs.predictions, outputs.label_ids
    trainer = trainer_of(tmp_path, **options)
    trainer.model.load_state_dict(plain.model.state_dict())
    metrics, found = evaluate(trainer, rows)
    for name in ("accuracy", "f1", "mcc", "loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(outputs.metrics[f"test_{name}"], abs=1e-5)
    size, _ = parts(ROWS, batch)
    assert len(found["eval_accuracy"]) == ROWS // size
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    of_rows = {
        "accuracy": (logits.argmax(1) == labels).astype(float),
        "loss": -logs[np.arange(ROWS), labels],
    }
    for name, values in of_rows.items():
        expected = values.reshape(-1, size).mean(axis=1) - values.mean()
        assert found[f"eval_{name}"] == pytest.approx(expected, abs=1e-4)
    without = [np.r_[0:x, x + size : ROWS] for x in range(0, ROWS, size)]
    left = np.array([matthews_corrcoef(labels[x], logits[x].argmax(1)) for x in without])
    expected = (len(left) - 1) * (left.mean() - left)
    assert found["eval_mcc"] == pytest.approx(expected, abs=1e-6)
    assert trainer.compute_metrics is scores_of and "prediction_step" not in vars(trainer)


def test_a_metric_that_cannot_be_computed_on_a_part_has_no_influence(tmp_path: Path) -> None:
    def whole(outputs: Any) -> dict[str, float]:
        if len(outputs.label_ids) < ROWS:
            raise ValueError("needs all rows")
        return accuracy(outputs)

    def rare(outputs: Any) -> dict[str, float]:
        return {"rare": math.nan if len(outputs.label_ids) < ROWS else 1.0, **accuracy(outputs)}

    def batched(outputs: Any, compute_result: bool) -> dict[str, float]:
        return {"count": len(outputs.label_ids)}

    rows = data("classes", ROWS)
    for measure, known in ((whole, {"loss"}), (rare, {"loss", "accuracy"}), (None, {"loss"})):
        metrics, found = evaluate(trainer_of(tmp_path, measure), rows)
        assert {*found} == {f"eval_{name}" for name in known} and metrics
    _, found = evaluate(trainer_of(tmp_path, batched, batch_eval_metrics=True), rows)
    assert {*found} == {"eval_loss"}


def test_rows_grouped_by_length_are_in_their_order(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    grouping = {"group_by_length": True, "train_sampling_strategy": "group_by_length"}
    vars(trainer.args).update({k: x for k, x in grouping.items() if hasattr(trainer.args, k)})
    rows = data("classes", ROWS)
    rows = rows.add_column("length", [1 + k % 4 for k in range(ROWS)])
    (_, grouped), plain = evaluate(trainer, rows), trainer_of(tmp_path)
    plain.model.load_state_dict(trainer.model.state_dict())
    assert grouped["eval_accuracy"] == pytest.approx(evaluate(plain, rows)[1]["eval_accuracy"])


class Noisy(LoRA):
    """A method that trains on half of the rows."""

    def all_rows(self, train: Any, upper: Any) -> Any:
        return train.select(range(len(train) // 2))


@pytest.mark.parametrize("heads", [False, True])
def test_the_intervals_of_a_comparison_are_over_seeds_and_rows(heads: bool) -> None:
    found = compared({"LoRA": LoRA(), "Noisy": Noisy()}, heads=heads)
    runs = [found.reported(name) for name in ("LoRA", "Noisy")]
    moved = [np.array([x["influence"]["eval_accuracy"] for x in each]) for each in runs]
    scores = found.scores()
    expected = Verdict(scores["Noisy"] - scores["LoRA"], True, moved[1] - moved[0])
    gap = found.verdicts[("Noisy", "method"), ("LoRA", "method")]
    assert gap.over_rows and found.over_rows and "× test rows" in found.heading()
    assert (gap.half, gap.freedom) == pytest.approx((expected.half, expected.freedom))
    table, mean = found.table(), Verdict(scores["LoRA"], True, moved[0])
    assert table["half_width"]["LoRA"] == pytest.approx(mean.half)
    assert found.differences()["freedom"].iloc[0] == pytest.approx(expected.freedom)
    for run in runs[0]:  # as of runs before
        del run["influence"]
    again = Comparison(found.plan, found.store)
    assert not again.over_rows and "accuracy is not known without parts" in str(again)
