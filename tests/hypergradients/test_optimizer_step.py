"""The functional form of an optimizer."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from hyperopt_peft import Engine, ProblemError, hypergradient
from hyperopt_peft.hypergradients import Estimate, Oracle
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from tests.support.optimizers import (
    OPTIMIZERS,
    make_levels,
    new_levels,
    slopes,
    start,
    trained,
)
from tests.support.quadratic import FunctionLevel, flat

Points = list[tuple[Tensor, Tensor]]
KINDS = list(dict.fromkeys(kind for kind, _ in OPTIMIZERS.values()))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Points:
    """Where each lower step of an Engine's run led, in functional form and in truth."""
    points: Points = []

    plain = Oracle.estimate

    def spy(oracle: Oracle, method: Any) -> Estimate:
        if not oracle.history:  # outside training
            return plain(oracle, method)
        functional = DifferentiableStep(oracle.lower, oracle.history[-1].optimizer)
        truths = [step.variables for step in oracle.history[1:]] + [oracle.lower.variables]
        for step, truth in zip(oracle.history, truths, strict=True):
            points.append((flat(functional.advance(step)[0]), flat(truth).detach().clone()))
        return plain(oracle, method)

    monkeypatch.setattr(Oracle, "estimate", spy)
    return points


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_variables_that_a_batch_does_not_read_rest(optimizer: str, replayed: Points) -> None:
    """The real optimizer passes over them: it neither decays them nor moves them on."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()

    def loss(reads_both: bool) -> Tensor:
        first = (w[0] * u[0][:, None]).square().sum()
        return first + (w[1] * u[1]).square() if reads_both else first

    upper = FunctionLevel(lambda _: w[0].sum() * w[1], u, lr=0.0)
    made = kind([{"params": [x]} for x in w], **options)
    lower = FunctionLevel(loss, w, data=[True, False], optimizer=made)
    Engine(upper, lower, "unrolled:steps=2", lower_steps=2, progress=False).run(1)
    for actual, truth in replayed:
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "max_grad_norm"),
    [("unrolled:steps=2", 1.0), ("unrolled:steps=2", None), ("sama:product=exact", 1.0)],
)
def test_a_gradient_that_is_exactly_zero_gives_no_nan(
    kind: type[Optimizer], max_grad_norm: float | None, method: str
) -> None:
    """Square roots and norms have no derivative at 0, where ∂f/∂w is here."""
    w, u = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"optimizer": kind([w], lr=0.1), "max_grad_norm": max_grad_norm}
    lower = FunctionLevel(lambda _: (w - u).square().sum() / 2, [w], **options)
    upper = FunctionLevel(lambda _: (w - 1).square().sum() / 2, [u])
    (h,) = hypergradient(upper, lower, method)
    assert torch.isfinite(h).all() and (h != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_variable_of_no_dimension_keeps_its_precision(
    kind: type[Optimizer], replayed: Points
) -> None:
    """A float64 number of no dimension, Adam's count, would widen it."""
    actual = []
    for dtype in (torch.float32, torch.float64):
        w = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        u = torch.tensor(0.2, dtype=dtype, requires_grad=True)
        f, made = lambda _, w=w, u=u: (w - u).square(), kind([w], lr=0.1)
        lower = FunctionLevel(f, [w], optimizer=made)
        upper = FunctionLevel(lambda _, w=w: w.square(), [u], lr=1.0)
        assert hypergradient(upper, lower, "unrolled:steps=3")[0].dtype is dtype
        Engine(upper, lower, "unrolled:steps=3", lower_steps=3, progress=False).run(1)
        actual.append(float(u.detach()))
    assert actual[0] == pytest.approx(actual[1], rel=1e-5)
    for after, truth in replayed:
        assert after.dtype is truth.dtype


@pytest.mark.parametrize("limit", [1e-6, 1.0])
def test_a_gradient_just_below_the_limit_is_clipped_alike(limit: float, replayed: Points) -> None:
    """As torch does, by limit/(norm + 1e-6): at a small limit that is a factor of its own."""
    w = torch.tensor([limit - 5e-7], dtype=torch.float64, requires_grad=True)
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    f = lambda _: (w.square() / 2 + u * w).sum()  # noqa: E731
    lower = FunctionLevel(f, [w], lr=0.5, max_grad_norm=limit)
    upper = FunctionLevel(lambda _: w.sum(), [u], lr=0.0)
    x = w.detach().clone().requires_grad_()
    x.grad = x.detach().clone()
    torch.nn.utils.clip_grad_norm_([x], limit)
    assert x.grad is not None and x.grad < x
    Engine(upper, lower, "unrolled", progress=False).run(1)
    ((actual, truth),) = replayed
    torch.testing.assert_close(actual, truth, rtol=1e-14, atol=0)
    torch.testing.assert_close(w.detach(), (x - 0.5 * x.grad).detach(), rtol=1e-14, atol=0)


def hooked(w: Any) -> SGD:
    """An optimizer that projects after each step."""
    optimizer = SGD(w, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: [x.detach().clamp_(min=0.0) for x in w])
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: None, "optimizer"),
        (torch.optim.NAdam, "NAdam"),
        (partial(Adam, amsgrad=True), "Adam .*without amsgrad"),
        (hooked, "step hooks"),
    ],
)
@pytest.mark.parametrize("method", ["unrolled", "sama"])
def test_optimizers_that_cannot_be_unrolled_are_named(make: Any, message: str, method: str) -> None:
    w, u = start()
    with pytest.raises(ProblemError, match=f"FunctionLevel: .*{message}"):
        hypergradient(*make_levels(make(w), w, u), method)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_differentiated(optimizer: str) -> None:
    levels = partial(new_levels, *OPTIMIZERS[optimizer], max_grad_norm=0.3)
    actual = trained(levels(), 2, 3, "unrolled:steps=3")
    torch.testing.assert_close(actual, slopes(levels, 3, before=2), rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("steps", [1, 2])
def test_outside_training_an_unread_variable_does_not_decay(steps: int) -> None:
    """A step leaves it alone; of the other, w' = w − lr·(2w + u + decay·w)."""
    read, unread = (torch.full((2,), x, dtype=torch.float64, requires_grad=True) for x in (1, 3))
    u = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = [read, unread]
    made = SGD(w, lr=0.5, weight_decay=0.1)
    lower = FunctionLevel(lambda _: (read.square() + u * read).sum(), w, optimizer=made)
    upper = FunctionLevel(lambda _: read.sum() + unread.sum(), [u])
    (h,) = hypergradient(upper, lower, f"unrolled:steps={steps}")
    factor = 1 - 0.5 * (2 + 0.1)
    expected = -2 * 0.5 * sum(factor**k for k in range(steps))
    assert float(h) == pytest.approx(expected, rel=1e-12)


def test_a_group_may_have_no_variables() -> None:
    """Transformers makes one of all biases and norms, which an adapter may lack."""
    actual = []
    for empty in ([], [{"params": [], "lr": 0.7}]):
        w, u = start()
        made = Adam([*empty, {"params": w}], lr=0.1)
        actual.append(flat(hypergradient(*make_levels(made, w, u), "unrolled:steps=2")))
    assert torch.equal(*actual)
