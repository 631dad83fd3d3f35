"""A step of several micro-batches is a step on all of their examples, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hyperopt_peft import Problem, hypergradient
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.trainer.accumulation import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.vector import Vector

CPU = [torch.device("cpu")]


class Net(nn.Module):
    """Two layers, with a gate that another level owns between them, in float64."""

    def __init__(self, dropout: Any = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 1).double()
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=torch.float64))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Any) -> Any:
        return self.second(self.drop(torch.tanh(self.first(x))) * self.gate)


class Fit(Problem):
    """Mean squared error, and a penalty that reads no example."""

    def __init__(self, net: Any, variables: Any, name: Any) -> None:
        self.net = net
        super().__init__(variables, name=name)

    def loss(self, batch: Any) -> Any:
        x, y = batch
        error = (self.net(x) - y).square().mean()
        pull = sum(w.square().sum() for w in self.net.first.parameters())
        return {"loss": error + 0.1 * pull, "error": error}


def levels(dropout: Any = 0.0) -> Any:
    net = Net(dropout).train()
    weights = [*net.first.named_parameters(prefix="first"), *net.second.named_parameters("second")]
    return Fit(net, {"gate": net.gate}, "upper"), Fit(net, weights, "lower")


def examples(count: Any, seed: Any = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(count, 1, generator=generator, dtype=torch.float64)


def parts(batch: Any, count: Any) -> Any:
    """``batch`` in equal parts, each with a random state of its own."""
    pieces = zip(*(tensor.chunk(count) for tensor in batch), strict=True)
    return [MicroBatch(piece, RandomState.seeded(CPU, 7, k)) for k, piece in enumerate(pieces)]


def close(actual: Any, expected: Any, tolerance: Any = 1e-12) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=tolerance, atol=tolerance)


@given(count=st.integers(1, 6), size=st.integers(1, 5))
@settings(max_examples=20)
def test_loss_metrics_and_gradient_are_those_of_all_examples(count: Any, size: Any) -> None:
    upper, lower = levels()
    batch = examples(count * size)
    variables = (*lower.variables, *upper.variables)
    expected = lower.gradient(batch, variables)
    accumulated = Accumulated(lower)
    found = accumulated.gradient(parts(batch, count), variables)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-12)
    close(found.gradient, expected.gradient)
    loss, metrics = accumulated.evaluate(parts(batch, count))
    assert loss.item() == pytest.approx(expected.loss, rel=1e-12)
    assert metrics == pytest.approx(expected.metrics, rel=1e-12)
    close(torch.autograd.grad(loss, variables), expected.gradient)


def oracle(upper: Any, lower: Any, batch: Any) -> Any:
    state = RandomState.seeded(CPU, 0)
    return Oracle(upper, lower, examples(6, seed=2), batch, state, state)


def products(upper: Any, lower: Any, batch: Any, kind: Any, **options: Any) -> Any:
    """H v and ∂²f/∂u∂w v along a fixed v."""
    torch.manual_seed(3)
    v = Vector([torch.randn_like(w) for w in lower.variables])
    with oracle(upper, lower, batch).open() as opened, opened.product(kind, **options) as product:
        return [*product.hessian(v), *product.mixed(v)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("exact", {}, 1e-12),
        ("difference", {}, 1e-8),
        ("difference", {"scheme": "forward"}, 1e-6),
        ("difference", {"epsilon": 1e-2}, 1e-11),
    ],
)
def test_second_derivatives_are_those_of_all_examples(
    kind: Any, options: Any, tolerance: Any, count: Any
) -> None:
    """A difference divides rounding by its epsilon, 1e-5 two-sided and 1e-8 one-sided."""
    upper, lower = levels()
    batch = examples(12)
    expected = products(upper, lower, batch, kind, **options)
    found = products(upper, Accumulated(lower), parts(batch, count), kind, **options)
    close(found, expected, tolerance)


# f is not convex here: a solve that stops early is the same early.
@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
@pytest.mark.parametrize("method", ["darts:product=exact", "cg:damping=0.1", "neumann:terms=5"])
def test_hypergradients_are_those_of_all_examples(method: Any) -> None:
    upper, lower = levels()
    batch, above = examples(12), examples(6, seed=2)
    expected = hypergradient(upper, lower, method, upper_batch=above, lower_batch=batch)
    found = hypergradient(
        upper, Accumulated(lower), method, upper_batch=above, lower_batch=parts(batch, 3)
    )
    close(found, expected, 1e-10)


def test_every_micro_batch_sees_its_own_mask_again() -> None:
    """At every evaluation, by either way, whatever the random state then is."""
    _, lower = levels(dropout=0.5)
    batch = parts(examples(12), 3)
    expected = []
    for micro in batch:
        micro.random_state.restore()
        expected.append(lower.loss(micro.batch)["loss"])
    mean = torch.stack(expected).mean()
    gradient = torch.autograd.grad(mean, lower.variables)
    accumulated = Accumulated(lower)
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found = accumulated.gradient(batch, lower.variables)
        loss, _ = accumulated.evaluate(batch)
        assert torch.equal(torch.get_rng_state(), state)
        assert found.loss == loss.item() == mean.item()
        close(found.gradient, gradient)


def test_directional_differences_are_of_one_function() -> None:
    """With dropout, a two-sided difference comes to the exact product under the same masks."""
    upper, lower = levels(dropout=0.5)
    accumulated = Accumulated(lower)
    batch = parts(examples(12), 3)
    exact = products(upper, accumulated, batch, "exact")
    difference = products(upper, accumulated, batch, "difference")
    close(difference, exact, 1e-7)


class Halved(Fit):
    def loss(self, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss([x.float() for x in batch])["loss"]


@pytest.mark.parametrize("ask", ["evaluate", "gradient"])
def test_it_runs_in_half_precision_where_the_level_does(ask: Any) -> None:
    """Differences are taken in single precision then, and would be noise otherwise."""
    net = Net().float()
    for kind in (Fit, Halved):
        accumulated = Accumulated(kind(net, net.first.named_parameters(), "lower"))
        batch = parts([x.float() for x in examples(6)], 2)
        assert accumulated.half is None
        options = () if ask == "evaluate" else (accumulated.variables,)
        getattr(accumulated, ask)(batch, *options)
        assert accumulated.half is (kind is Halved)


def test_a_variable_that_one_micro_batch_does_not_read_counts_as_zero_there() -> None:
    w, v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 3.0))

    class Some(Problem):
        def loss(self, batch: Any) -> Any:
            return w * batch if batch > 0 else v * batch

    idle = torch.zeros((), dtype=torch.float64, requires_grad=True)
    state = RandomState.seeded(CPU, 0)
    batch = [MicroBatch(torch.tensor(x), state) for x in (1.0, -4.0, 2.0, -6.0)]
    found = Accumulated(Some([w, v, idle])).gradient(batch, (w, v, idle))
    assert found.loss == (1 * 2 - 4 * 3 + 2 * 2 - 6 * 3) / 4
    assert found.gradient == (3 / 4, -10 / 4, None)


def test_a_metric_of_some_micro_batches_is_the_mean_over_these() -> None:
    class Sometimes(Fit):
        def loss(self, batch: Any) -> Any:
            found = super().loss(batch)
            return {"loss": found["loss"], ("long" if len(batch[0]) > 2 else "short"): 1.0}

    net = Net()
    level = Accumulated(Sometimes(net, net.named_parameters(), "lower"))
    state = RandomState.capture()
    batch = [MicroBatch(examples(count), state) for count in (3, 2, 4)]
    assert level.gradient(batch, level.variables).metrics == {"long": 1.0, "short": 1.0}
    assert level.evaluate(batch)[1] == {"long": 1.0, "short": 1.0}
