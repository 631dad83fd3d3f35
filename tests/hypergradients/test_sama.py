"""SAMA is unrolling by one step of the lower optimizer, which is tested against autograd."""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from hyperopt_peft import hypergradient
from hyperopt_peft.core.problem import StepRecord
from hyperopt_peft.hypergradients import Vector
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from tests.support.by_hand import BATCHES, OPTIMIZERS, make_levels, start, trained
from tests.support.quadratic import FunctionLevel, flat

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@each_optimizer
@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_unrolling_by_one_step(optimizer: str, limit: float | None, training: bool) -> None:
    """Clipping included, which makes D a full matrix; outside training the step is the next one."""
    kind, options = OPTIMIZERS[optimizer]
    estimates = []
    for method in ("sama:product=exact", "unrolled:steps=1"):
        w, u = start()
        levels = make_levels(kind(w, **options), w, u, max_grad_norm=limit)
        if training:
            estimates.append(trained(levels, 1, 2, method))
        else:
            estimates.append(flat(hypergradient(*levels, method)))
    torch.testing.assert_close(*estimates, rtol=1e-12, atol=1e-12)


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
    _, actual, _, _ = DifferentiableStep(lower, snapshot).vjp(step, b)
    c1, c2 = 1 - beta1**3, 1 - beta2**3
    for x, g, v, along in zip(w, gradient, b, actual, strict=True):
        state = made.state[x]
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        s = ((beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g) / c2).sqrt()
        of_root = (m / c1) * (1 - beta2) * g / (c2 * s * (s + eps) ** 2)
        d = lr * ((1 - beta1) / (c1 * (s + eps)) - of_root)
        torch.testing.assert_close(along, -d * v, rtol=1e-13, atol=1e-15)


@each_optimizer
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])
def test_differences_agree_with_double_backward(optimizer: str, scheme: str, order: int) -> None:
    kind, options = OPTIMIZERS[optimizer]
    actual = []
    for method in (f"sama:scheme={scheme}", "sama:product=exact"):
        w, u = start()
        actual.append(trained(make_levels(kind(w, **options), w, u), 1, 2, method))
    torch.testing.assert_close(actual[0], actual[1], rtol=0, atol=10.0 ** (-3 - 3 * order))


def test_a_step_is_recorded_with_its_own_gradient() -> None:
    """torch's Nesterov step over many tensors writes to it, and 0.43 would become 1.25."""
    actual = []
    for limit in (None, 0.9):
        w, u = start()
        made = SGD(w, lr=0.2, momentum=0.95, nesterov=True, foreach=True)
        levels = make_levels(made, w, u, max_grad_norm=limit)
        actual.append(trained(levels, 2, 1, "sama:product=exact"))
    assert torch.equal(*actual)


def test_half_precision_variables_have_their_step_in_single_precision() -> None:
    actual = []
    for dtype in (torch.bfloat16, torch.float64):
        w = torch.tensor([0.5, -1.0, 2.0], dtype=dtype, requires_grad=True)
        u = torch.tensor([0.25, 0.75, -0.5], dtype=dtype, requires_grad=True)
        lower = FunctionLevel(lambda _, w=w, u=u: (w - u).square().sum(), [w])
        lower.optimizer = AdamW([w], lr=0.125, eps=0.5)
        upper = FunctionLevel(lambda _, w=w: w.square().sum(), [u])
        (h,) = hypergradient(upper, lower, "sama")
        assert h.dtype == dtype
        actual.append(h.double())
    torch.testing.assert_close(actual[0], actual[1], rtol=2e-2, atol=0)
