"""One unrolled step of gradient descent at rate ξ, and the derivative of an optimizer's step."""

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from hyperopt_peft import Engine, ProblemError, hypergradient
from tests.support.optimizers import f, make_levels, start, upper_f
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
