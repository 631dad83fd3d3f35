"""`why`: each set changes the prediction of the head that is trained without it."""

import csv
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hyperopt_peft import ProblemError, why
from hyperopt_peft.attribution.reasons import Reasons
from hyperopt_peft.attribution.why import explained, fewest, reason_for
from hyperopt_peft.heads import Features
from tests.support.attributed import require_equal
from tests.support.heads import L2, features, fitted, trainer
from tests.support.trainers import data, ragged


def prediction(rows: Features, out: list[int], x: torch.Tensor) -> int:
    """By another library, trained on the rows that stay; the penalty is a share of all rows."""
    kept = [k for k in range(len(rows.labels)) if k not in set(out)]
    model = LogisticRegression(C=1 / (L2 * len(rows.labels)), tol=1e-10, max_iter=10_000)
    model.fit(rows.x[kept].numpy(), rows.labels[kept].numpy())
    return int(model.predict(x.numpy()[None])[0])


@pytest.mark.parametrize("seed", range(4))
def test_a_set_changes_the_prediction_of_another_library_s_head(seed: int) -> None:
    """And the set without its last row does not. Classes of three, whose rivals are several."""
    train, others, found = features(60, seed), features(12, seed + 10), 0
    training = fitted(train)
    for place in range(12):
        reason = reason_for(training, others, place)
        if reason.becomes is None:
            continue
        found += 1
        x = others.x[place]
        assert prediction(train, [], x) == reason.predicted != reason.becomes
        assert prediction(train, reason.rows, x) == reason.becomes
        assert prediction(train, reason.rows[:-1], x) == reason.predicted
    assert found >= 6


def test_sets_are_smaller_than_those_of_random_rows_of_the_class() -> None:
    """On the whole: not for each row."""
    train, others = features(80), features(30, 1)
    training, sizes = fitted(train), []
    for place in range(30):
        reason, x = reason_for(training, others, place), others.x[place : place + 1]
        of_class = (train.labels == reason.predicted).nonzero()[:, 0]
        source = torch.Generator().manual_seed(place)
        random = fewest(training, x, of_class[torch.randperm(len(of_class), generator=source)])
        if reason.becomes is not None:
            sizes.append((len(reason.rows), random[0] if random else 40))
    assert len(sizes) > 10
    assert sum(a for a, _ in sizes) < 0.7 * sum(b for _, b in sizes)


def test_a_row_with_a_wrong_label_is_why_its_neighbour_is_wrong() -> None:
    """Two clusters; a row of the first one has the second one's label and the explained x."""
    source = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(40, 5, generator=source, dtype=torch.float64)
    labels = torch.arange(40) % 2
    x[:, 0] += 2 * labels - 1
    x[0, 1], x[0, 0], labels[0] = 3.0, -0.2, 1
    other = x[:1].clone()
    training = fitted(Features(x, labels, torch.arange(40)), 2)
    reason = reason_for(training, Features(other, torch.tensor([0]), torch.tensor([0])), 0)
    assert (reason.predicted, reason.becomes, reason.rows) == (1, 0, [0])


def test_a_prediction_that_half_of_the_rows_do_not_hold_up_has_a_bound() -> None:
    """Each row says the same."""
    x = torch.ones(20, 5, dtype=torch.float64)
    labels = torch.tensor([0] * 18 + [1] * 2)
    training = fitted(Features(x, labels, torch.arange(20)), 2)
    reason = reason_for(training, Features(x[:1], labels[:1], torch.tensor([0])), 0)
    assert reason.becomes is None and reason.rows == [] and reason.searched == 10
    assert "even without the 10 rows" in Reasons([reason], {}, {}, {}).text(reason)


def test_of_tags_wrong_tokens_are_explained_and_else_the_least_sure() -> None:
    training = fitted(features(60, classes=2), 2)
    x = torch.zeros(5, 5, dtype=torch.float64)
    x[:, 0] = torch.tensor([3.0, -3.0, 2.0, 3.0, 0.5])
    sure = training.on_rows.model(x).logits.argmax(1)
    places = Features(x, sure.clone(), torch.tensor([0, 0, 0, 1, 1]))
    places.labels[1] = 1 - sure[1]
    assert explained(training, places) == [1, 4]
    reason = reason_for(training, places, 4)
    assert (reason.row, reason.token) == (1, 1)


def test_each_row_of_a_trainer_is_explained(tmp_path: Path) -> None:
    """The head leaves the model as it is. A row without a label is explained too."""
    train, rows = data("classes", 30), data("classes", 6, seed=1)
    rows = rows.map(
        lambda row, number: {"labels": -100 if number == 2 else row["labels"]}, with_indices=True
    )
    watched, unchanged = (
        trainer(tmp_path, train_dataset=train, eval_dataset=rows) for _ in range(2)
    )
    reasons = why(watched, progress=False)
    require_equal(watched.model, unchanged.model, 0.0)
    assert [reason.row for reason in reasons] == list(range(6))


def test_tags_of_a_trainer_and_a_file(tmp_path: Path) -> None:
    """Whole rows are removed for a token."""
    train, rows = ragged("tokens", 30), data("tokens", 5, seed=2)
    reasons = why(
        trainer(tmp_path, "tokens", train_dataset=train, eval_dataset=rows), progress=False
    )
    assert {reason.row for reason in reasons} == set(range(5))
    assert all(reason.token is not None for reason in reasons)
    reasons.to_csv(tmp_path / "why.csv")
    with (tmp_path / "why.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(max(1, len(reason.rows)) for reason in reasons)
    assert lines[0]["explained"] == "0" and lines[0]["predicted"].startswith("LABEL_")
    reasons.plot(tmp_path / "why.png")
    assert (tmp_path / "why.png").stat().st_size > 5_000


def test_numbers_and_rows_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    numbers, classes = trainer(tmp_path, "regression"), trainer(tmp_path)
    with pytest.raises(ProblemError, match="classes can be explained"):
        why(numbers, progress=False)
    with pytest.raises(ProblemError, match="would explain itself"):
        why(classes, classes.train_dataset, progress=False)
