"""One unrolled step of gradient descent at rate ξ, and the derivative of an optimizer's step."""

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from hyperopt_peft import Engine, ProblemError, hypergradient
from hyperopt_peft.core.problem import StepRecord
from hyperopt_peft.hypergradients import Vector
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from tests.support.optimizers import BATCHES, f, make_levels, start, upper_f
from tests.support.quadratic import flat, program


def test_a_xi_of_zero_leaves_the_direct_term() -> None:
    quadratic = program(0)
    actual = flat(hypergradient(*quadratic.levels(), "darts:xi=0"))
    torch.testing.assert_close(actual, quadratic.direct)


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)])
def test_xi_can_be_the_learning_rate_of_the_lower_optimizer(lr: float | Tensor) -> None:
    quadratic = program(0)
    upper, lower = quadratic.levels()
    assert lower.optimizer is not None
    lower.optimizer.param_groups[0]["lr"] = lr
    actual = flat(hypergradient(upper, lower, "darts:xi=lr"))
    expected = quadratic.direct + quadratic.implicit(0.05 * quadratic.b)
    torch.testing.assert_close(actual, expected)


def test_the_learning_rate_must_be_one() -> None:
    w, u = start()
    groups = [{"params": [w[0]], "lr": 0.1}, {"params": [w[1]], "lr": 0.2}]
    upper, lower = make_levels(SGD(groups), w, u)
    with pytest.raises(ProblemError, match=r"darts: xi=\"lr\".*0.2"):
        hypergradient(upper, lower, "darts:xi=lr")
    lower.optimizer = None
    with pytest.raises(ProblemError, match=r'darts: xi="lr".*optimizer'):
        hypergradient(upper, lower, "darts:xi=lr")


@pytest.mark.parametrize("tensor", [False, True])
def test_in_training_the_product_is_taken_where_the_last_lower_step_began(tensor: bool) -> None:
    """−ξ·∂²f/∂u∂w(w₀) · ∂F/∂w(w₁), with the learning rate of that step for ξ.

    A schedule changes a learning rate that is a ``tensor`` in place.
    """
    w, u = start()
    optimizer = SGD(w, lr=torch.tensor(0.4, dtype=torch.float64) if tensor else 0.4)
    upper, lower = make_levels(optimizer, w, u, scheduler=ExponentialLR(optimizer, 0.5))
    before = flat(u).detach()
    Engine(upper, lower, "darts:xi=lr,product=exact", warmup_steps=1, progress=False).run(1)
    actual = before - flat(u).detach()

    def gradient(step: int, w: list[Tensor], u: list[Tensor]) -> tuple[Tensor, ...]:
        batch = lower.batches.data[step]
        return torch.autograd.grad(f(w, u, batch), w, create_graph=True)

    w, u = start()
    w = [x.detach() - 0.4 * g.detach() for x, g in zip(w, gradient(0, w, u))]
    w = [x.requires_grad_() for x in w]
    at_start = gradient(1, w, u)
    w = [(x - 0.2 * g).detach().requires_grad_() for x, g in zip(w, at_start)]
    direct = torch.autograd.grad(upper_f(w, u), u, materialize_grads=True)
    b = torch.autograd.grad(upper_f(w, u), w)
    mixed = torch.autograd.grad(at_start, u, b)
    torch.testing.assert_close(actual, flat(direct) - 0.2 * flat(mixed), rtol=1e-9, atol=1e-12)


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
        first = (1 - beta1) / (c1 * (s + eps))
        rounding = 100 * torch.finfo(x.dtype).eps * lr * (first + of_root.abs()) * v.abs()
        assert bool(((along + lr * (first - of_root) * v).abs() <= rounding).all())
