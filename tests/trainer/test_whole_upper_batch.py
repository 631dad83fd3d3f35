"""A small upper data set is one batch, computed in pieces: to rounding the batch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft.trainer.upper_batches import FULL
from tests.support.class_weights import pair, rows
from tests.support.trainers import data, peft_model, ragged, trainer


def above(run: Any) -> list[dict[str, float]]:
    return [record for record in run.state.log_history if "upper_loss" in record]


@pytest.mark.parametrize("kind", ["tokens", "causal"])
def test_a_label_counts_the_same_in_each_piece(tmp_path: Path, kind: str) -> None:
    losses = []
    for size, count in ((None, 3), (9, 1)):
        settings = {"per_device_upper_batch_size": size, "hypergradient": "direct"}
        model, options = peft_model(kind, dropout=0.0), {"train_dataset": ragged(kind, 45)}
        run = trainer(tmp_path / str(size), model=model.double(), options=options, **settings)
        assert run.upper_batches.count == count
        run.train()
        losses.append([record["upper_loss"] for record in above(run)])
    # The loss of a language model is computed in float32.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_pieces_have_masks_of_their_own_that_differ_from_step_to_step(tmp_path: Path) -> None:
    """At rates of zero, with dropout, and with equal rows."""
    row = data(rows=1)
    equal = {name: row[name][:] * 6 for name in row.column_names}
    upper = type(row).from_dict(equal, features=row.features)
    settings = {"learning_rate": 0.0, "upper_learning_rate": 0.0, "weight_decay": 0.0}
    settings |= {"per_device_train_batch_size": 2, "lower_steps": 1, "max_steps": 3}
    options = {"train_dataset": data(seed=4), "upper_dataset": upper}
    run, seen = trainer(tmp_path, options=options, hypergradient="direct", **settings), []
    loss = run.upper.task_loss
    run.upper.task_loss = lambda batch: seen.append(loss(batch)) or seen[-1]
    run.train()
    assert len(seen) == 9 and len({float(x) for x in seen}) == 9


@pytest.mark.parametrize("count", [FULL, FULL + 1])
def test_a_larger_set_has_batches_of_the_lower_level_s_size(tmp_path: Path, count: int) -> None:
    run, _ = pair(tmp_path, upper_rows=rows(count, 1), per_device_train_batch_size=16)
    pieces = run.upper_batches.pieces(0)
    if count <= FULL:
        assert sum(len(piece["labels"]) for piece, _ in pieces) == count
    else:
        assert [len(piece["labels"]) for piece, _ in pieces] == [16]
