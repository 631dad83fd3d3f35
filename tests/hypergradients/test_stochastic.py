"""Dropout: all evaluations of one objective inside one hypergradient see the same masks."""

import pytest
import torch
from torch import Tensor

from hyperopt_peft import Problem, hypergradient
from tests.support.minilm import levels, minilm
from tests.support.networks import differences
from tests.support.quadratic import FunctionLevel


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
