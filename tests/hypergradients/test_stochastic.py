"""Dropout: all evaluations of one objective inside one hypergradient see the same masks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperopt_peft import Engine, Problem, hypergradient
from tests.support.minilm import levels, minilm
from tests.support.networks import Network, differences, loader, owned
from tests.support.quadratic import FunctionLevel, flat


@pytest.fixture(scope="module")
def language_model() -> tuple[Problem, Problem]:
    return levels(minilm())


@pytest.mark.parametrize("seed", [None, 7])
def test_a_hypergradient_is_a_function_of_the_random_state(
    language_model: tuple[Problem, Problem], seed: int | None
) -> None:
    """Of the current state, or of ``seed`` alone where one is given."""
    torch.manual_seed(1)
    first = hypergradient(*language_model, "darts", seed=seed)
    again = hypergradient(*language_model, "darts", seed=seed)
    torch.manual_seed(2)
    elsewhere = hypergradient(*language_model, "darts", seed=seed)
    assert not differences(first, again)
    assert bool(differences(first, elsewhere)) == (seed is None)


def double_precision_levels(lr: float = 0.1) -> tuple[Problem, Problem, Network]:
    """The network in float64 with dropout, gradient descent at the lower level."""
    torch.manual_seed(0)
    net = Network().double()

    def loss(batch: Any) -> Tensor:
        return cross_entropy(net(batch[0].double()), batch[1])

    above, below = owned(net)
    descents = [torch.optim.SGD([v for _, v in pairs], lr=lr) for pairs in (above, below)]
    upper = FunctionLevel(loss, above, data=loader(14), optimizer=descents[0])
    return upper, FunctionLevel(loss, below, data=loader(18), optimizer=descents[1]), net


def after_training(method: str) -> Tensor:
    """The upper variables after three upper steps from the same start and random state."""
    upper, lower, _ = double_precision_levels()
    torch.manual_seed(5)
    Engine(upper, lower, method, lower_steps=2, progress=False).run(3)
    return flat(upper.variables).detach()


@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("central", 2)])
def test_differences_in_training_converge_to_one_unrolled_step(scheme: str, order: int) -> None:
    """At the order of their scheme; a mask that differed would leave O(1/ε)."""
    exact = after_training("unrolled:steps=1")
    errors = [
        float((after_training(f"darts:xi=lr,scheme={scheme},epsilon={epsilon}") - exact).norm())
        for epsilon in (1e-2, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.2)
    assert errors[1] < 1e-2 * float((after_training("direct") - exact).norm())


@pytest.mark.parametrize("method", ["darts", "cg:damping=5"])
@pytest.mark.parametrize("product", ["exact", "difference"])
def test_variables_that_a_loss_does_not_read_have_a_gradient_of_zero(
    method: str, product: str
) -> None:
    """Upper ones that only one loss reads, lower ones that neither does."""
    separator = "," if ":" in method else ":"
    w, u, unread_w, read_u, unread_u = (
        torch.full((2,), x, dtype=torch.float64, requires_grad=True) for x in range(1, 6)
    )

    def levels(w_owned: list[Tensor], u_owned: list[Tensor]) -> tuple[Problem, Problem]:
        upper = FunctionLevel(lambda _: w.square().sum() + read_u.square().sum(), u_owned)
        return upper, FunctionLevel(lambda _: (w.exp() * u).sum() + (w - u) @ (w - u), w_owned)

    estimator = f"{method}{separator}product={product}"
    actual, of_read, of_unread = hypergradient(
        *levels([w, unread_w], [u, read_u, unread_u]), estimator
    )
    assert torch.equal(of_read, 2 * read_u) and torch.equal(of_unread, 0 * unread_u)
    (expected,) = hypergradient(*levels([w], [u]), estimator)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
