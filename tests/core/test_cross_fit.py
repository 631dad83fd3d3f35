"""A cross-fitted program is the mean of its folds' programs: closed forms and separate runs."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from hyperopt_peft import (
    Engine,
    Nested,
    Problem,
    ProblemError,
    cross_fit,
    hypergradient,
    split_folds,
)
from hyperopt_peft.core.cross_fit import Folds, PerFold
from hyperopt_peft.core.prior import GaussianPrior
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.hypergradients import get_estimator
from hyperopt_peft.problems.ridge import Ridge, RidgeValidation
from tests.support.networks import differences
from tests.support.quadratic import FunctionLevel

FOLDS = 3
# Of 3 × 10 lower variables; enough steps for the joint system.
METHODS = ["exact", "cg:steps=60,tolerance=1e-14", "minres:steps=60,tolerance=1e-14"]
METHODS += ["darts:product=exact", "unrolled:steps=4"]


def ridges() -> tuple[list[RidgeValidation], list[Ridge]]:
    """Diabetes in three folds: a w for each fold, penalties for all, and no w at its minimum."""
    x, y = (torch.from_numpy(a) for a in load_diabetes(return_X_y=True))
    x, y = 20 * x[:90], (y[:90] - y.mean()) / y.std()
    of_row = torch.tensor(split_folds(len(x), FOLDS, seed=1))
    penalty = torch.linspace(-3, -1, x.shape[1], dtype=x.dtype).requires_grad_()
    uppers, lowers = [], []
    for k in range(FOLDS):
        w = torch.linspace(-k, 1, x.shape[1], dtype=x.dtype).requires_grad_()
        uppers.append(RidgeValidation(penalty, w, x[of_row == k], y[of_row == k]))
        lowers.append(Ridge(w, penalty, x[of_row != k], y[of_row != k]))
    return uppers, lowers


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("method", METHODS)
def test_the_hypergradient_is_the_mean_of_the_folds(method: str) -> None:
    uppers, lowers = ridges()
    pairs = zip(uppers, lowers, strict=True)
    separate = [hypergradient(upper, lower, method)[0] for upper, lower in pairs]
    (joint,) = hypergradient(*cross_fit(uppers, lowers), method)
    assert close(joint, torch.stack(separate).mean(0))


@pytest.mark.parametrize("method", METHODS[:3])
def test_at_the_minima_it_is_the_derivative_of_the_cross_validated_loss(method: str) -> None:
    """By autograd through the closed form of every w_k*(u)."""
    uppers, lowers = ridges()
    u = uppers[0].variables[0]
    total = torch.zeros((), dtype=u.dtype)
    for upper, lower in zip(uppers, lowers, strict=True):
        lower.solve()
        gram = lower.x.T @ lower.x / len(lower.x) + torch.diag(u.exp())
        w = torch.linalg.solve(gram, lower.x.T @ lower.y / len(lower.x))
        total = total + (upper.x @ w - upper.y).square().mean() / 2 / FOLDS
    (truth,) = torch.autograd.grad(total, u)
    (found,) = hypergradient(*cross_fit(uppers, lowers), method)
    assert close(found, truth)


def separate_runs(method: str, steps: int, lower_steps: int) -> list[Tensor]:
    """K programs of their own over one u, which follows the mean of their hypergradients."""
    uppers, lowers = ridges()
    engines = [BilevelStep(*pair, get_estimator(method)) for pair in zip(uppers, lowers)]
    for number in range(steps):
        slopes = []
        for engine in engines:
            engine.forget()
            for k in range(lower_steps):
                engine.train_lower(number=number * lower_steps + k + 1)
            slopes.append(engine.hypergradient(None, number=number + 1).hypergradient[0])
        uppers[0].step([torch.stack(slopes).mean(0)])
    return [uppers[0].variables[0], *(lower.variables[0] for lower in lowers)]


@pytest.mark.parametrize("method", METHODS)
def test_an_engine_trains_as_the_folds_engines_with_averaged_hypergradients(method: str) -> None:
    upper, lower = cross_fit(*ridges())
    Engine(upper, lower, method, lower_steps=4, progress=False).run(6)
    expected = separate_runs(method, steps=6, lower_steps=4)
    for found, known in zip((*upper.variables, *lower.variables), expected, strict=True):
        assert close(found, known, 1e-8)


def test_metrics_are_means_and_losses_a_mean_above_and_a_sum_below() -> None:
    w = [torch.tensor([float(k)], requires_grad=True) for k in range(3)]
    u = torch.ones(1, requires_grad=True)

    def level(k: int, owned: Tensor) -> FunctionLevel:
        return FunctionLevel(lambda b: {"loss": (w[k] * u).sum() + b, "row": b}, [owned])

    upper, lower = cross_fit([level(k, u) for k in range(3)], [level(k, w[k]) for k in range(3)])
    assert lower.names == tuple(f"fold{k}.variable 0" for k in range(3))
    assert upper.names == ("variable 0",)
    batch = PerFold([1.0, 2.0, 6.0])
    for joint, loss in ((lower, 12.0), (upper, 4.0)):
        evaluation = joint.gradient(batch, (*w, u))
        value, metrics = joint.evaluate(batch)
        assert evaluation.loss == float(value.detach()) == loss
        assert evaluation.metrics == metrics == {"row": 3.0}
        slopes = [float(slope) for slope in evaluation.gradient]
        assert slopes == pytest.approx([loss / 12 * s for s in (1.0, 1.0, 1.0, 3.0)])
    assert lower.gradient(2.0, w).loss == 9.0  # a batch that all folds share


@pytest.mark.parametrize("method", ["exact", "darts:product=exact"])
def test_a_prior_of_the_upper_level_counts_once(method: str) -> None:
    """Given before or after the levels are joined; logged apart from the loss."""
    move, losses = torch.linspace(0, 1, 10, dtype=torch.float64), []
    for late in (False, True):
        uppers, lowers = ridges()
        u = uppers[0].variables[0]
        if not late:
            for level in uppers:
                level.prior = GaussianPrior(3.0, [u])
        upper, lower = cross_fit(uppers, lowers)
        if late:
            upper.prior = GaussianPrior(3.0, [u])
        with torch.no_grad():
            u.add_(move)
        plain, prior = Folds(uppers, [("u", u)], scale=1 / FOLDS), 1.5 * move.square().mean()
        expected = hypergradient(plain, lower, method)[0] + 3 * move / 10
        assert close(hypergradient(upper, lower, method)[0], expected)
        value, metrics = upper.evaluate(None)
        assert torch.allclose(value, plain.evaluate(None)[0] + prior, rtol=1e-12)
        assert metrics == upper.gradient(None, [u]).metrics == {"prior": pytest.approx(prior)}
        history = Engine(upper, lower, method, progress=False).run(3)
        assert history[0]["upper_prior"] == pytest.approx(prior)
        losses.append([record["upper_loss"] for record in history])
    assert losses[0] == losses[1]


def test_a_variable_that_the_prior_alone_reads_is_an_error() -> None:
    u, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    w = [torch.ones(1, requires_grad=True) for _ in range(2)]
    sgd = {"optimizer": SGD([u, v], 0.1), "prior": 1.0}
    uppers = [FunctionLevel(lambda _, x=x: (x * u).sum(), [u, v], **sgd) for x in w]
    lowers = [
        FunctionLevel(lambda _, x=x: (x - u).square().sum(), [x], optimizer=SGD([x], 0.1))
        for x in w
    ]
    with pytest.raises(ProblemError, match="variable 1"):
        Engine(*cross_fit(uppers, lowers), "direct", progress=False).run(1)


class Minibatches(Problem):
    """(w − u)·x on batches of a fold's own rows, with dropout."""

    def __init__(self, k: int, w: Tensor, u: Tensor, owned: Tensor, optimizer: Any) -> None:
        self.w, self.u = w, u
        rows = torch.arange(7.0, dtype=torch.float64) + 10 * k
        data = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
        super().__init__([owned], data=data, optimizer=optimizer)

    def loss(self, batch: Tensor) -> Tensor:
        kept = nn.functional.dropout(batch, 0.3)
        return (self.w * kept - self.u).square().mean() / 100 + self.w.square().sum()


def minibatch_engine() -> Engine:
    torch.manual_seed(0)
    u = torch.ones((), dtype=torch.float64, requires_grad=True)
    w = [torch.tensor(k / 3, dtype=torch.float64, requires_grad=True) for k in range(FOLDS)]
    uppers = [Minibatches(k, w[k], u, u, Adam([u], 0.1)) for k in range(FOLDS)]
    lowers = [Minibatches(k, w[k], u, w[k], SGD([w[k]], 1e-2, 0.9)) for k in range(FOLDS)]
    upper, lower = cross_fit(uppers, lowers)
    lower.scheduler = ExponentialLR(lower.optimizer, 0.9)
    return Engine(upper, lower, "cg:steps=3", lower_steps=2, progress=False)


def test_a_run_resumes_bit_identically_at_any_step() -> None:
    whole = minibatch_engine()
    whole.run(7)
    broken = minibatch_engine()
    broken.run(3)
    state = broken.state_dict()
    resumed = minibatch_engine()
    resumed.run(1)  # what it did before does not matter
    resumed.load_state_dict(state)
    resumed.run(4)
    assert not differences(resumed.state_dict(), whole.state_dict())
    state["lower"]["batches"].pop("2")
    with pytest.raises(ProblemError):
        resumed.load_state_dict(state)


def test_each_fold_reads_its_own_next_batch() -> None:
    lower = minibatch_engine().lower
    peeked = lower.peek_batch()
    batch = lower.next_batch()
    assert isinstance(batch, PerFold) and [int(part[0] // 10) for part in batch] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(peeked, batch, strict=True))


def test_one_graph_is_in_memory_at_a_time() -> None:
    alive, most = [0], [0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    peaks = []
    for folds in (2, 6):
        u = torch.ones(3, requires_grad=True)
        w = [torch.ones(3, requires_grad=True) for _ in range(folds)]
        losses = [lambda _, x=x, u=u: (x * u).exp().sum() for x in w]
        uppers = [FunctionLevel(loss, [u]) for loss in losses]
        lowers = [FunctionLevel(loss, [x]) for loss, x in zip(losses, w, strict=True)]
        upper, lower = cross_fit(uppers, lowers)
        for joint in (upper, lower):
            most[0] = 0
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
                joint.gradient(None, (u, *w))
                for loss, _ in joint.terms(None):
                    loss.backward()
                    del loss
            peaks.append(most[0])
    assert len(set(peaks)) == 1 and alive == [0]


def test_losses_and_backward_passes_are_within_the_context_of_their_fold() -> None:
    inside: list[int] = []
    seen = []

    @contextmanager
    def within(k: int) -> Any:
        inside.append(k)
        try:
            yield
        finally:
            inside.pop()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
            ctx.k = k
            seen.append((k, *inside))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Any:
            seen.append((ctx.k, *inside))
            return slope, None

    u = torch.ones(1, requires_grad=True)
    w = [torch.ones(1, requires_grad=True) for _ in range(3)]
    losses = [lambda _, k=k: Watched.apply((w[k] * u).sum(), k) for k in range(3)]
    upper, lower = cross_fit(
        [FunctionLevel(loss, [u]) for loss in losses],
        [FunctionLevel(loss, [x]) for loss, x in zip(losses, w, strict=True)],
        within=within,
    )
    lower.gradient(None, w)
    for loss, _ in upper.terms(None):
        loss.backward()
    assert len(seen) == 12 and all(k == there for k, there in seen) and not inside


def test_the_joint_optimizer_keeps_options_and_states_of_every_fold() -> None:
    u = torch.ones(2, requires_grad=True)
    w = [torch.ones(2, requires_grad=True) for _ in range(2)]
    lowers = [
        FunctionLevel(
            lambda _, x=x: (x - u).square().sum(),
            [x],
            optimizer=SGD([x], lr=0.1 * (k + 1), momentum=0.5),
            max_grad_norm=3.0,
        )
        for k, x in enumerate(w)
    ]
    for level in lowers:
        level.step([torch.ones(2)])
    uppers = [FunctionLevel(lambda _, x=x: (x * u).sum(), [u]) for x in w]
    _, joint = cross_fit(uppers, lowers)
    before = [x.detach().clone() for x in w]
    joint.step([torch.zeros(2), torch.zeros(2)])
    for k in range(2):  # the momentum of each goes on at its own rate
        assert torch.allclose(before[k] - w[k], torch.full((2,), 0.05 * (k + 1)))
    # Gradients of equal norm are each clipped at the limit of a fold.
    assert joint.clipping(2**0.5 * 6.0) == pytest.approx(0.5)


def test_joint_levels_that_are_no_program_are_refused() -> None:
    u, v = (torch.ones(1, requires_grad=True) for _ in range(2))
    w = [torch.ones(1, requires_grad=True) for _ in range(2)]

    def level(x: Tensor, **options: Any) -> Problem:
        return FunctionLevel(lambda _: x.sum(), [x], **options)

    uppers, lowers = [level(u), level(u)], [level(x) for x in w]
    sgd = [SGD([x], lr=0.1) for x in w]
    chain = Nested(level(w[1], optimizer=sgd[1]), level(v, optimizer=SGD([v], lr=0.1)))
    scheduled = [level(x, optimizer=o, scheduler=ExponentialLR(o, 0.9)) for x, o in zip(w, sgd)]
    refused: dict[str, tuple[Any, Any]] = {
        "two or more folds": (uppers[:1], lowers[:1]),
        "one upper and one lower": (uppers, lowers[:1]),
        "different tensors": ([level(u), level(v)], lowers),
        "variables of its own": (uppers, [lowers[0], level(w[0])]),
        "levels below": (uppers, [lowers[0], chain]),
        "different classes": (uppers, [level(w[0], optimizer=sgd[0]), lowers[1]]),
        "scheduler": (uppers, scheduled),
        "has a prior": (uppers, [level(w[0], prior=1.0), lowers[1]]),
        "give each data": (uppers, [level(w[0], data=[1]), lowers[1]]),
    }
    for message, (above, below) in refused.items():
        with pytest.raises(ProblemError, match=message):
            cross_fit(above, below)


@given(
    st.lists(st.sampled_from("abc"), min_size=2, max_size=40), st.integers(2, 6), st.integers(0, 9)
)
def test_folds_are_even_stratified_and_a_function_of_the_seed(
    classes: list[str], folds: int, seed: int
) -> None:
    if folds > len(classes):
        with pytest.raises(ProblemError):
            split_folds(len(classes), folds)
        return
    found = split_folds(len(classes), folds, seed=seed, classes=classes)
    assert found == split_folds(len(classes), folds, seed=seed, classes=classes)
    sizes = Counter(found)
    assert set(sizes) <= set(range(folds)) and len(found) == len(classes)
    most = max(Counter(classes).values())
    assert len(sizes) == folds
    for name in set(classes):
        each = [sum(f == k and c == name for f, c in zip(found, classes)) for k in range(folds)]
        assert most < folds or max(each) - min(each) <= 1
