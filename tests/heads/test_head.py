"""A head on features: its loss, its minimum and penalty, and the hypergradient there."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import BertConfig, BertForSequenceClassification

from hyperopt_peft import ProblemError, hypergradient
from hyperopt_peft.core.logits import MULTI_LABEL
from hyperopt_peft.core.prior import GaussianPrior
from hyperopt_peft.core.task_level import TaskLevel
from hyperopt_peft.engine import lbfgs
from hyperopt_peft.heads import Features, Head, choose_l2, l2_penalty, level_of, solve
from hyperopt_peft.heads.head import head_of, require_head
from hyperopt_peft.heads.minimum import PENALTIES, gram_of, held_out_losses, sampled
from hyperopt_peft.utils import distributed
from tests.support.heads import features
from tests.support.weighted_levels import weighted

L2 = 0.3


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def level(head: Head) -> TaskLevel:
    return TaskLevel(head, head.named_parameters(), prior=l2_penalty(L2))


def ridge(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """The minimum (d + 1, C) of Σ_i v_i ‖x_i·W + b − y_i‖²/(N·C) + ½·λ·‖W‖²."""
    ones = torch.cat([x, x.new_ones(len(x), 1)], 1)
    penalty = L2 * torch.eye(ones.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0
    scale = 2 * weights[:, None] / y.numel()
    return torch.linalg.solve(ones.T @ (scale * ones) + penalty, ones.T @ (scale * y))


@pytest.mark.parametrize(
    ("labels", "problem_type", "loss"),
    [
        (torch.tensor([0, 2, 1, 0, 2]), None, cross_entropy),
        (random(5, 3), None, mse_loss),
        (random(5, 3).gt(0).double(), MULTI_LABEL, None),
    ],
)
def test_the_loss_is_that_of_a_transformers_model(
    labels: Tensor, problem_type: str | None, loss: Any
) -> None:
    head = Head(4, 3, problem_type=problem_type, dtype=torch.float64)
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    x = random(5, 4, seed=1)
    output = head(x, labels)
    torch.testing.assert_close(output.logits, x @ head.weight + head.bias)
    expected = (loss or binary_cross_entropy_with_logits)(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    assert head(x).loss is None


@pytest.mark.parametrize("shape", [(5, 1), (5, 3)])
@pytest.mark.parametrize("kind", [None, "regression", MULTI_LABEL])
def test_numbers_are_scored_as_by_the_model(shape: tuple[int, int], kind: str | None) -> None:
    """Soft labels too, of which nothing says what they are."""
    labels = random(*shape).sigmoid().float()
    tiny = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=shape[1]
    )
    tiny.problem_type = kind
    model = BertForSequenceClassification(tiny).eval()
    states = model.bert(torch.ones(5, 2, dtype=torch.int64)).pooler_output.detach()
    head = head_of(model, Features(states, labels, torch.arange(5)))
    head.load_state_dict({"weight": model.classifier.weight.T, "bias": model.classifier.bias})
    expected = model(torch.ones(5, 2, dtype=torch.int64), labels=labels).loss
    torch.testing.assert_close(head(states, labels).loss, expected)


def test_solve_ends_at_a_small_gradient_of_classes() -> None:
    """From any start at the same minimum, and at once from the minimum itself."""
    batch = {"features": random(60, 6), "labels": torch.arange(60) % 4}
    ends = []
    for seed in (0, 1):
        head = Head(6, 4, dtype=torch.float64)
        head.weight.data = random(6, 4, seed=seed)
        problem = level(head)
        lbfgs(problem, batch, tolerance=1e-7)
        gradient = problem.gradient(batch, problem.variables).gradient
        assert all(float(slope.abs().max()) <= 1e-7 for slope in gradient if slope is not None)
        assert lbfgs(problem, batch, tolerance=1e-7) == 1
        ends.append(head.weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_the_hypergradient_of_a_ridge_is_that_of_its_closed_form() -> None:
    """Three sources of 8 rows, at weights that differ, and held-out rows."""
    head, labels = Head(3, 1, dtype=torch.float64), random(33, 1, seed=2)
    upper, lower = weighted("source", head, 3, prior=l2_penalty(L2))
    (logits,) = upper.variables
    logits.data = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    upper.prior = GaussianPrior(0.1, [logits])
    below = {"features": random(24, 3), "labels": labels[:24], "source": torch.arange(24) // 8}
    above = {"features": random(9, 3, seed=1), "labels": labels[24:]}
    lbfgs(lower, below, tolerance=1e-7)
    batches = {"upper_batch": above, "lower_batch": below}
    (slope,) = hypergradient(upper, lower, "cg:steps=50,tolerance=1e-12", **batches)
    weights = logits.detach().clone().requires_grad_()
    v = 3 * weights.softmax(0)  # of equally many rows
    w = ridge(below["features"], below["labels"], v[below["source"]])
    loss = mse_loss(above["features"] @ w[:-1] + w[-1], above["labels"])
    prior = 0.1 / 2 * (weights - upper.prior.start[0]).square().mean()
    (expected,) = torch.autograd.grad(loss + prior, weights)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-6)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ProblemError, match="world_size: 2 processes"):
        require_head(None, {})


def test_the_penalty_follows_the_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Small where the classes are linear in the features, the largest where they are random."""
    head = Head(5, 3, dtype=torch.float64)
    choose_l2(head, features(300))
    assert not caplog.text
    linear, noise = features(300, noise=0.01), features(60, noise=100.0)
    assert choose_l2(head, linear) < 0.1
    assert choose_l2(head, noise, largest=False) < choose_l2(head, noise) == max(PENALTIES)
    assert "λ = 10 is the largest one tried" in caplog.text
    assert not head.weight.any()


def test_the_penalty_is_within_a_standard_error_of_the_best() -> None:
    """And not within a deviation of the losses, which would be another one."""
    head, rows = Head(5, 3, dtype=torch.float64), features(300, noise=0.3)
    losses = held_out_losses(head, rows)
    means, best = losses.mean(1), losses.mean(1).argmin()
    spread = losses[best].std()
    good, other = (
        [penalty for penalty, mean in zip(PENALTIES, means, strict=False) if mean <= limit]
        for limit in (means[best] + spread / math.sqrt(300), means[best] + spread)
    )
    assert good[0] < other[0]
    assert choose_l2(head, rows) == good[0]
    assert choose_l2(head, rows, largest=False) == good[-1]


def test_held_out_rows_have_trained_no_head_that_predicts_them() -> None:
    """Labels that have nothing to do with 80 features are no better predicted than by chance."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(60, 80, generator=source, dtype=torch.float64)
    labels = torch.randint(3, (60,), generator=source)
    head, rows = Head(80, 3, dtype=torch.float64), Features(x, labels, torch.arange(60))
    losses = held_out_losses(head, rows)
    assert losses.shape[1] == 60 and bool((losses.mean(1) > math.log(3)).all())


def test_a_sample_has_every_class_in_its_share() -> None:
    """And whole rows of tokens."""
    rows = features(1000)
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)[torch.randperm(1000)]
    some = sampled(Features(rows.x, labels, rows.row), 100)
    assert some.labels.bincount().tolist() == [90, 9, 1]
    tokens = sampled(Features(rows.x, labels, torch.arange(1000) // 4), 100)
    assert 80 <= len(tokens.row) <= 100 and {*tokens.row.bincount().tolist()} <= {0, 4}
    assert sampled(rows, 1000) is rows


def test_dependent_features_take_few_steps_to_the_same_minimum() -> None:
    """As those of neighbouring layers are: R makes the second derivative nearly the identity."""
    rows = features(300)
    x = torch.cat([rows.x, rows.x + 1e-3 * features(300, seed=1).x, 5 * rows.x.flip(1)], 1)
    rows, ends, counts = Features(x, rows.labels, rows.row), [], []
    for factor in (None, gram_of(rows, 3)):
        head = Head(15, 3, dtype=torch.float64)
        if factor is not None:
            factor = torch.linalg.cholesky(factor.double() + 0.1 * torch.eye(15), upper=True)
        counts.append(lbfgs(level_of(head), rows.batch(), tolerance=1e-7, factor=factor))
        ends.append(torch.cat([head.weight, head.bias[None]]).detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    assert counts[1] < counts[0] / 2
    solve(level_of(head), rows.batch(), gram=gram_of(rows, 3))  # is at the minimum already
    torch.testing.assert_close(head.weight.detach(), ends[1][:-1], rtol=0, atol=1e-12)
