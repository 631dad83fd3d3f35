"""`LossCorrection`: C in closed form, its loss and gradient, and what a known C recovers."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from hyperopt_peft import ProblemError
from hyperopt_peft.heads import Features, Head
from hyperopt_peft.problems import LossCorrection
from hyperopt_peft.problems.loss_correction import confusions
from tests.support.comparisons import compared
from tests.support.sources import rows, sources, trainer

C = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.6, 0.3], [0.0, 0.5, 0.5]], dtype=torch.float64)


def groups(number: torch.Tensor, labels: torch.Tensor) -> Features:
    """Rows whose features tell their group alone, on a scale without a penalty."""
    x = 1e3 * torch.eye(2, dtype=torch.float64)[number]
    return Features(x, labels, torch.arange(len(labels)))


def test_confusions_are_the_mean_shares_over_the_trusted_rows_of_a_class() -> None:
    """A head on two groups predicts their shares of labels; class 2 has no trusted row."""
    noisy = groups(torch.tensor([0] * 4 + [1] * 5), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    trusted = groups(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
    one, two = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.4, 0.6]], dtype=torch.float64)
    expected = torch.stack([(2 * one + two) / 3, two, torch.tensor([0, 0, 1]).to(two)])
    torch.testing.assert_close(confusions(noisy, trusted, 3), expected, rtol=0, atol=2e-4)


def fixed(matrix: torch.Tensor, count: int) -> LossCorrection:
    """The method with a known C for ``count`` rows, followed by trusted ones."""
    method = LossCorrection()
    method.rows(range(count), ["trusted"])
    method.confusions = torch.stack([matrix, torch.eye(3).to(matrix)])
    return method


def test_the_gradient_is_the_probability_less_that_of_the_class_given_the_label() -> None:
    """p(a | x) − p(a | x, label y) by the rule of Bayes; the plain loss for trusted rows."""
    torch.manual_seed(0)
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y, index = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 2, 5, 4, 3])
    method = fixed(C, 3)
    method.logits_of = lambda model, batch: z  # type: ignore[method-assign]
    loss = method.lower_loss(None, {"labels": y, "index": index}, None)
    p = z.softmax(-1)
    of_label = torch.stack([p[:3, a] * C[a, y[:3]] for a in range(3)], 1)
    plain = cross_entropy(z[3:], y[3:], reduction="sum")
    torch.testing.assert_close(6 * loss, plain - of_label.sum(1).log().sum())
    (gradient,) = torch.autograd.grad(loss, z)
    known = torch.cat([of_label / of_label.sum(1, True), torch.eye(3).to(z)[y[3:]]])
    torch.testing.assert_close(6 * gradient, p - known)


def test_a_known_c_recovers_the_shares_of_the_right_classes() -> None:
    """At the minimum on all labels that C makes of the shares p, softmax(z) is p, and not p·C."""
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    counts = (1000 * shares @ C).round().long()
    number = torch.arange(2).repeat_interleave(counts.sum(1))
    labels = torch.cat([torch.arange(3).repeat_interleave(each) for each in counts])
    head, method = Head(2, 3, dtype=torch.float64), fixed(C, len(labels))
    batch = {"features": torch.eye(2, dtype=torch.float64)[number], "labels": labels}
    batch["index"] = torch.arange(len(labels))
    best = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        best.zero_grad()
        loss: torch.Tensor = method.lower_loss(head, batch, None)
        loss.backward()
        return loss

    for _ in range(5):
        best.step(closure)
    found = head(torch.eye(2, dtype=torch.float64)).logits.softmax(-1).detach()
    torch.testing.assert_close(found, shares, rtol=0, atol=5e-3)


@pytest.mark.parametrize("by_source", [True, False])
def test_each_source_has_its_own_confusions(tmp_path: Path, by_source: bool) -> None:
    """One source is right, and the labels of the other are moved by one."""
    run = trainer(tmp_path, method=LossCorrection(by_source=by_source), max_steps=1)
    run.train()
    *found, identity = run.method.confusions
    assert len(run.train_dataset) == 126 and len(found) == 1 + by_source
    assert torch.equal(identity, torch.eye(3).to(identity))
    for each in found:
        torch.testing.assert_close(each.sum(1), torch.ones(3).to(each))
    if by_source:
        assert [each.argmax(1).tolist() for each in found] == [[0, 1, 2], [1, 2, 0]]


@pytest.mark.parametrize("heads", [False, True])
def test_it_is_compared_on_adapters_and_heads(heads: bool) -> None:
    """Most labels of a source are moved by one: corrected ones score higher."""
    comparison = compared(
        {"LoRA": "lora", "corrected": LossCorrection(by_source=True)},
        arguments={"per_device_train_batch_size": 16},
        train_dataset=sources(60),
        upper_dataset=rows(24, 3),
        test_dataset=rows(60, 4),
        metric="loss",
        passes=40,
        heads=heads,
    )
    plain, corrected = comparison.scores()[["LoRA", "corrected"]].sum()
    assert corrected < plain


def test_refused() -> None:
    with pytest.raises(ProblemError, match="upper_dataset"):
        LossCorrection().rows(sources(), None)
    with pytest.raises(ProblemError, match="'web'"):
        LossCorrection(by_source=True, column="web").rows(sources(), rows(4, 3))
