"""`MixTrainer`: the bad source loses, and everything is trained with the learnt weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import ProblemError
from tests.support.mix_runs import rows, sources, trainer
from tests.support.trainers import values


def test_the_bad_source_loses(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    weights, shares = run.row_weights(), run.shares()
    assert weights["good"] > 2 * weights["bad"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["good"] == pytest.approx(weights["good"] * 48 / 126, rel=1e-5)


def test_everything_is_trained_from_the_initial_values(tmp_path: Path) -> None:
    """With the learnt weights, which stay: the second phase is one of its own."""
    run = trainer(tmp_path)
    begin = values(run.model)
    run.train()
    learnt = run.weights.logits.detach().clone()
    again = trainer(tmp_path / "again", retrain_steps=5, max_steps=1, upper_learning_rate=0.0)
    with torch.no_grad():
        again.weights.logits.copy_(learnt)
    again.train()
    assert torch.equal(again.weights.logits, learnt)
    for name, value in values(run.model).items():
        assert torch.allclose(value, values(again.model)[name], atol=1e-6), name
    assert any(not torch.equal(value, begin[name]) for name, value in values(run.model).items())
    assert run.retrainer is not None
    assert run.retrainer.train_dataset["source"][-1] == 2  # the trusted rows


def test_votes_of_labelling_functions(tmp_path: Path) -> None:
    """Of which one is wrong by a class, and a column of text is no matter."""
    below = rows(60, 4)
    right = torch.tensor(below["labels"][:])
    votes = torch.stack([right, (right + 1) % 3], 1)
    votes[::2, 0] = votes[1::5, 1] = -1
    below = below.remove_columns("labels").add_column("votes", votes.tolist())
    below = below.add_column("text", ["words"] * 60)
    run = trainer(tmp_path, given=below)
    run.train()
    weights = run.row_weights()
    assert weights["0"] > 2 * weights["1"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"cross_fit": None}, "cross_fit"),
        ({"given": {"good": rows(9, 1)}}, "two or more"),
        ({"trusted": sources()["good"].select(range(5))}, "5 of 5"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, options: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        trainer(tmp_path, **options)
