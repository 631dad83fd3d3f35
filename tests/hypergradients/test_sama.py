"""SAMA against autograd through one step of the lower optimizer, written out by hand."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

from hyperopt_peft import Engine, Problem, ProblemError, hypergradient
from hyperopt_peft.core.problem import StepRecord
from hyperopt_peft.hypergradients import Vector
from hyperopt_peft.hypergradients.unrolled.optimizer_step import OptimizerStep
from tests.support.by_hand import (
    BATCHES,
    OPTIMIZERS,
    ByHand,
    make_levels,
    start,
    trained,
    trained_by_hand,
    upper_f,
)
from tests.support.quadratic import FunctionLevel, flat

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@each_optimizer
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("lower_steps", [1, 3])
def test_in_training_it_is_the_derivative_of_the_last_step(
    optimizer: str, warmup: int, lower_steps: int
) -> None:
    """The optimizer's very first step among them, where there is no state."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    levels = make_levels(kind(w, **options), w, u)
    found = trained(levels, warmup, lower_steps, "sama:product=exact")
    before = warmup + lower_steps - 1
    expected = trained_by_hand(ByHand(kind, [options] * 2), before, steps=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@each_optimizer
@pytest.mark.parametrize("limit", [None, 0.05])
def test_it_is_unrolling_by_one_step(optimizer: str, limit: float | None) -> None:
    """Clipping included, which makes D a full matrix."""
    kind, options = OPTIMIZERS[optimizer]
    found = []
    for method in ("sama:product=exact", "unrolled:steps=1"):
        w, u = start()
        levels = make_levels(kind(w, **options), w, u, max_grad_norm=limit)
        found.append(trained(levels, 1, 2, method))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_the_diagonal_of_adam_is_its_closed_form() -> None:
    """D = lr·[(1−β1)/(c1(s+eps)) − (m/c1)(1−β2)g / (c2·s·(s+eps)²)], in the third step."""
    lr, (beta1, beta2), eps = 0.05, (0.8, 0.95), 1e-6
    w, u = start()
    made = Adam(w, lr=lr, betas=(beta1, beta2), eps=eps)
    _, lower = make_levels(made, w, u)
    for _ in range(2):
        lower.step(lower.gradient(lower.next_batch(), w).gradient)
    snapshot = lower.optimizer_snapshot(with_state=True)
    gradient = lower.gradient(BATCHES[2], w).gradient
    step = StepRecord(BATCHES[2], None, tuple(w), gradient, None, snapshot)
    b = Vector(torch.randn_like(x) for x in w)
    _, found, _, _ = OptimizerStep(lower, snapshot).vjp(step, b)
    c1, c2 = 1 - beta1**3, 1 - beta2**3
    for x, g, v, along in zip(w, gradient, b, found, strict=True):
        state = made.state[x]
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        s = ((beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g) / c2).sqrt()
        of_root = (m / c1) * (1 - beta2) * g / (c2 * s * (s + eps) ** 2)
        d = lr * ((1 - beta1) / (c1 * (s + eps)) - of_root)
        torch.testing.assert_close(along, -d * v, rtol=1e-13, atol=1e-15)


@each_optimizer
def test_parameter_groups_and_schedules_keep_their_own_options(optimizer: str) -> None:
    """The groups are in the reverse order of the variables."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    faster = options | {"lr": 3 * options["lr"], "weight_decay": 0.2}
    made = kind([{"params": [w[1]], **faster}, {"params": [w[0]]}], **options)
    hand = ByHand(kind, [options, faster])
    hand.gamma = 0.7
    scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.7)
    found = trained(make_levels(made, w, u, scheduler=scheduler), 2, 1, "sama:product=exact")
    torch.testing.assert_close(found, trained_by_hand(hand, 2, 1), rtol=1e-12, atol=1e-12)


@each_optimizer
def test_outside_training_the_step_is_the_next_one(optimizer: str) -> None:
    """On the batch that comes next; F is differentiated at the current point."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    hand, made = ByHand(kind, [options] * 2), kind(w, **options)
    upper, lower = make_levels(made, w, u)
    hand.run(2, w, u, BATCHES)
    for _ in range(2):
        lower.step(lower.gradient(lower.next_batch(), w).gradient)
    hand.forget_the_graph()
    direct = flat(torch.autograd.grad(upper_f(w, u), u, materialize_grads=True))
    adjoint = torch.autograd.grad(upper_f(w, u), w)
    implicit = flat(torch.autograd.grad(hand.run(1, w, u, [BATCHES[2]]), u, adjoint))
    state = repr(made.state_dict())
    found = flat(hypergradient(upper, lower, "sama:product=exact"))
    torch.testing.assert_close(found, direct + implicit, rtol=1e-12, atol=1e-12)
    assert implicit.norm() > 1e-3 * direct.norm()
    assert repr(made.state_dict()) == state


@each_optimizer
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])
def test_differences_agree_with_double_backward(optimizer: str, scheme: str, order: int) -> None:
    kind, options = OPTIMIZERS[optimizer]
    found = []
    for method in (f"sama:scheme={scheme}", "sama:product=exact"):
        w, u = start()
        found.append(trained(make_levels(kind(w, **options), w, u), 1, 2, method))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=10.0 ** (-3 - 3 * order))


def test_a_step_is_recorded_with_its_own_gradient() -> None:
    """torch's Nesterov step over many tensors writes to it, and 0.43 would become 1.25."""
    found = []
    for limit in (None, 0.9):
        w, u = start()
        made = SGD(w, lr=0.2, momentum=0.95, nesterov=True, foreach=True)
        levels = make_levels(made, w, u, max_grad_norm=limit)
        found.append(trained(levels, 2, 1, "sama:product=exact"))
    assert torch.equal(*found)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop"])
def test_variables_that_a_batch_does_not_read_are_left_alone(optimizer: str) -> None:
    """The step does not move the second variable, so that its answer to u is zero."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()

    def loss(reads_both: bool) -> Tensor:
        first = (w[0] * u[0][:, None]).square().sum()
        return first + (w[1] * u[1]).square() if reads_both else first

    upper = FunctionLevel(lambda _: w[0].sum() + 5 * w[1], u, optimizer=SGD(u, lr=1.0))
    lower = FunctionLevel(loss, w, data=[True, False], optimizer=kind(w, **options))
    before = u[1].detach().clone()
    Engine(upper, lower, "sama", lower_steps=2, progress=False).run(1)
    assert torch.equal(u[1], before)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, RMSprop])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_gradient_that_is_exactly_zero_gives_no_nan(
    kind: type[Optimizer], max_grad_norm: float | None
) -> None:
    w, u = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = kind([w], lr=0.1)
    lower = FunctionLevel(
        lambda _: (w - u).square().sum() / 2, [w], optimizer=optimizer, max_grad_norm=max_grad_norm
    )
    upper = FunctionLevel(lambda _: -w.sum(), [u])
    (h,) = hypergradient(upper, lower, "sama:product=exact")
    # The first update of Adam is −lr·g/(|g| + eps), that of RMSprop −lr·g/(0.1·|g| + eps).
    slope = 0.1 if kind is SGD else 0.1 / 1e-8
    torch.testing.assert_close(h, torch.full_like(h, -slope), rtol=1e-8, atol=0)


def test_half_precision_variables_have_their_step_in_single_precision() -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        w = torch.tensor([0.5, -1.0, 2.0], dtype=dtype, requires_grad=True)
        u = torch.tensor([0.25, 0.75, -0.5], dtype=dtype, requires_grad=True)
        lower = FunctionLevel(lambda _, w=w, u=u: (w - u).square().sum(), [w])
        lower.optimizer = AdamW([w], lr=0.125, eps=0.5)
        upper = FunctionLevel(lambda _, w=w: w.square().sum(), [u])
        (h,) = hypergradient(upper, lower, "sama")
        assert h.dtype == dtype
        found.append(h.double())
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=0)


def test_an_adam_may_decay_as_adamw_does() -> None:
    """One of a later torch has an option for it."""
    if "decoupled_weight_decay" not in inspect.signature(Adam).parameters:
        pytest.skip("this torch has no such option")
    options = {"lr": 0.05, "weight_decay": 0.3}
    for method in ("sama:product=exact", "unrolled:steps=1"):
        found = []
        for kind, more in ((AdamW, {}), (Adam, {"decoupled_weight_decay": True})):
            w, u = start()
            found.append(trained(make_levels(kind(w, **options, **more), w, u), 1, 1, method))
        torch.testing.assert_close(found[0], found[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: None, "optimizer"),
        (lambda w: NAdam(w), "NAdam"),
    ],
)
def test_optimizers_without_a_form_are_named(make: Any, message: str) -> None:
    w, u = start()
    with pytest.raises(ProblemError, match=f"FunctionLevel: .*{message}"):
        hypergradient(*make_levels(make(w), w, u), "sama")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("epsilon=0", "epsilon "),
        ("scheme=both", "scheme .*'central'.*'forward'"),
    ],
)
def test_mistakes_are_named(options: str, message: str) -> None:
    w, u = start()
    levels: tuple[Problem, Problem] = make_levels(SGD(w, lr=0.1), w, u)
    with pytest.raises(ProblemError, match=f"sama: {message}"):
        hypergradient(*levels, f"sama:{options}")
