"""`RowWeights` and `WeightNet`: their hypergradient, wrong labels, and what trains afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hyperopt_peft import hypergradient
from hyperopt_peft.core.labels import label_losses, row_losses
from hyperopt_peft.problems import SEAL, RowWeights, WeightNet
from hyperopt_peft.trainer.tags import without
from tests.support.differences import displace, gradient
from tests.support.methods import method_trainer
from tests.support.trainers import data
from tests.support.weighted_levels import Linear, regularised, rows, value

METHODS = {
    "rows": lambda: RowWeights(keep=None),
    "softmax": lambda: RowWeights(keep=None, form="softmax"),
    "net": lambda: WeightNet(5),
}


def levels(kind: str, count: int = 30) -> tuple[Any, ...]:
    """The method, its levels over a linear classifier, clean rows, and rows with wrong labels."""
    torch.manual_seed(4)
    model, method = Linear(), METHODS[kind]()
    noisy, clean = rows(count, seed=1, noise=0.4)[0], rows(100, seed=2)[0]
    noisy["index"] = torch.arange(count)
    if kind != "net":
        method.rows([None] * count, [None])
    method.row_losses = row_losses
    method.prepare(model)
    for x in method.upper_variables(model).values():
        x.data = x.data.double()
    upper = method.upper(model, lambda batch: model(**batch).loss)
    lower = regularised(method.lower(model, lambda batch: model(**batch).loss))
    lower.tags = ["index"]
    return method, upper, lower, clean, noisy


@pytest.mark.parametrize("kind", METHODS)
def test_the_hypergradient_is_the_slope_of_the_value(kind: str) -> None:
    _, upper, lower, clean, noisy = levels(kind)
    for variable in upper.variables:
        torch.nn.init.normal_(variable, std=0.5)
    value(upper, lower, clean, noisy)
    slopes = hypergradient(upper, lower, "exact", upper_batch=clean, lower_batch=noisy)
    for variable, slope in zip(upper.variables, slopes, strict=True):

        def moved(shift: Any, variable: Any = variable) -> Any:
            displace([variable], shift)
            result = value(upper, lower, clean, noisy)
            displace([variable], -shift)
            return result

        slope = slope.flatten()
        entries = slope.abs().topk(min(3, len(slope))).indices.tolist()
        expected = gradient(moved, len(slope), step=1e-4, entries=entries)  # a net has kinks
        torch.testing.assert_close(slope[entries], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", METHODS)
def test_the_lower_loss_has_the_weights_of_the_rows(kind: str) -> None:
    method, upper, lower, _, noisy = levels(kind)
    for x in (*upper.variables, *lower.variables):
        torch.nn.init.normal_(x)
    logits = lower.model(noisy["x"]).logits
    each = cross_entropy(logits, noisy["labels"], reduction="none")
    weights = method.row_weights(each.detach()) if kind == "net" else method.row_weights()
    pull = sum(w.square().sum() for w in lower.variables)
    torch.testing.assert_close(lower.loss(noisy), (weights * each).mean() + 0.05 * pull)
    assert weights.std() > 0.1
    assert kind == "net" or weights.argmax() == method.logits.argmax()


@pytest.mark.parametrize("keep", [0.25, None])
def test_the_second_phase_has_the_best_rows_or_the_weights(tmp_path: Path, keep: Any) -> None:
    sets = {"upper_dataset": data(rows=5, seed=1)}
    sets["eval_dataset"] = data(rows=6, seed=2).add_column("index", range(6))
    method = RowWeights(keep=keep)
    run = method_trainer(tmp_path, method=method, options=sets)
    assert run.args.retrain == "scratch"
    run.train()
    assert run.evaluate()["eval_loss"] > 0  # by a model that sees no tags
    assert method.logits.count_nonzero() and (method.row_weights() - 1).abs().max() < 1
    numbers, size = run.retrainer.train_dataset["index"][:], 24 if keep is None else 6
    assert len(numbers) == size + 5 and numbers[size:] == [*range(24, 29)]
    best = set(method.logits.topk(size).indices.tolist())
    assert set(numbers[:size]) == best and (hasattr(run.retrainer.lower, "weights")) == (size > 6)
    if keep is None:
        batch = {"index": torch.tensor([3, 28, 24])}
        expected = torch.stack([method.row_weights()[3], torch.tensor(1.0), torch.tensor(1.0)])
        assert torch.equal(run.retrainer.lower.weights(batch), expected)


def test_seal_trains_anew_on_the_best_rows_alone(tmp_path: Path) -> None:
    """Its upper batches are of training rows, its lower ones of all."""
    trusted, method = {"upper_dataset": data(rows=5, seed=1)}, SEAL(keep=0.5)
    run = method_trainer(tmp_path, method=method, options=trusted, hypergradient="direct")
    assert (len(run.train_dataset), len(run.upper_dataset)) == (29, 24)
    assert run.args.retrain == "scratch"
    run.train()
    best = set(method.logits.topk(12).indices.tolist())
    assert set(run.retrainer.train_dataset["index"][:]) == best and len(best) == 12


def test_seal_s_means_are_over_labels(tmp_path: Path) -> None:
    """Training rows of one label and trusted rows of all; the second phase counts none."""
    train, trusted = data("tokens", 8), data("tokens", 3, seed=1)
    one = [[labels[0]] + [-100] * (len(labels) - 1) for labels in train["labels"][:]]
    train = train.remove_columns("labels").add_column("labels", one)
    method, options = SEAL(trust=0.7), {"train_dataset": train, "upper_dataset": trusted}
    run = method_trainer(tmp_path, method=method, task="tokens", options=options, max_steps=2)
    batch = run.data_collator([run.train_dataset[row] for row in range(11)])
    run.model.eval()
    method.logits.data = torch.linspace(-1, 1, 8)
    losses, scored = label_losses(run.model, without(batch, ["index"]))
    assert scored[:8].sum() == 8 < scored[8:].sum()
    sigma = method.row_weights()
    expected = 0.7 * losses[8:].sum() / scored[8:].sum() + 0.3 * (sigma @ losses[:8].sum(1)) / 8
    torch.testing.assert_close(run.lower.loss(batch)["loss"], expected)
    counted = method.labels
    run.train()
    assert method.labels == counted
