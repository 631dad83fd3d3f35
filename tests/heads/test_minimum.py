"""A head's minimum, and the choice of its penalty."""

import math

import pytest
import torch

from hyperopt_peft.engine import lbfgs
from hyperopt_peft.heads import Features, Head, choose_l2, level_of, solve
from hyperopt_peft.heads.minimum import PENALTIES, gram_of, held_out_losses, sampled
from tests.support.heads import features


def test_the_penalty_follows_the_rows() -> None:
    """Small where the classes are linear in the features, the largest where they are random."""
    head = Head(5, 3, dtype=torch.float64)
    linear, random = features(300, noise=0.01), features(60, noise=100.0)
    assert choose_l2(head, linear) < 0.1 and choose_l2(head, random) == max(PENALTIES)
    assert choose_l2(head, random, largest=False) < choose_l2(head, random)
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


def test_a_penalty_at_an_end_of_the_grid_is_said(caplog: pytest.LogCaptureFixture) -> None:
    head = Head(5, 3, dtype=torch.float64)
    choose_l2(head, features(300))
    assert not caplog.text
    choose_l2(head, features(60, noise=100.0))
    assert "λ = 10 is the largest one tried" in caplog.text


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
