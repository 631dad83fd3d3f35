"""Calls of linear maps are seen however they are written, with the rows' inputs and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from hyperopt_peft.hypergradients.contrib.linear_calls import Layer, linear_calls

X, W, C = torch.randn(4, 5, 3), torch.randn(2, 3), torch.randn(2)


def seen(loss: Callable[..., Tensor], *variables: Tensor) -> dict[tuple[Layer, int], Any]:
    variables = tuple(x.clone().requires_grad_() for x in variables)
    with linear_calls(variables) as calls:
        loss(*variables).backward()
    assert not nn.modules.module._global_forward_hooks
    return calls.rows()


@pytest.mark.parametrize(
    ("call", "variables", "layer", "columns"),
    [
        (lambda w: linear(X, w), [W], Layer(0), 3),
        (lambda w, c: linear(X, w, c), [W, C], Layer(0, 1), 4),
        (lambda c, w: linear(X, bias=c, weight=w), [C, W], Layer(1, 0), 4),
        (lambda c: linear(X, W, c), [C], Layer(None, 0), 1),
        (lambda w: X @ w, [W.T], Layer(0, transposed=True), 3),
        (lambda w: torch.matmul(X, other=w), [W.T], Layer(0, transposed=True), 3),
        (lambda w: X.matmul(w), [W[0]], Layer(0, transposed=True), 3),
        (lambda w: linear(X, w), [W[0]], Layer(0, transposed=True), 3),
    ],
)
def test_the_gradient_of_the_variables_is_the_sum_over_rows_and_tokens(
    call: Callable[..., Tensor], variables: list[Tensor], layer: Layer, columns: int
) -> None:
    actual = seen(lambda *v: call(*v).sin().sum(), *variables)
    ((key, (x, delta)),) = actual.items()
    assert key == (layer, 4) and x.shape == (4, 5, columns) and delta.shape[:2] == (4, 5)
    owned = [v.clone().requires_grad_() for v in variables]
    gradients = torch.autograd.grad(call(*owned).sin().sum(), owned)
    matrix = torch.einsum("rto,rti->oi", delta, x)
    torch.testing.assert_close(matrix, layer.matrix(gradients))
    written = [torch.zeros_like(v) for v in variables]
    layer.assign_(written, matrix)
    for part, expected in zip(written, gradients, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w @ W.T,
        lambda w: linear(X, w).detach() * w.sum(),
        lambda w: linear(X, 2 * w),
        lambda w: torch.einsum("rti,oi->rto", X, w),
    ],
)
def test_other_operations_are_not_seen(call: Callable[[Tensor], Tensor]) -> None:
    assert not seen(lambda w: call(w).square().sum(), W)


def test_products_of_two_variables_are_not_seen() -> None:
    """B @ A, where no side is an input."""
    assert not seen(lambda b, a: (b @ a).square().sum(), torch.randn(4, 2), torch.randn(2, 3))


def test_calls_with_equally_many_rows_are_further_tokens() -> None:
    def loss(w: Tensor) -> Tensor:
        return linear(X, w).sin().sum() + linear(X[:, 0], w).cos().sum() + linear(X[:3], w).sum()

    actual = seen(loss, W)
    assert {rows: x.shape for (_, rows), (x, _) in actual.items()} == {4: (4, 6, 3), 3: (3, 5, 3)}


def test_gradient_checkpointing_shows_each_call_once() -> None:
    def loss(w: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: linear(x, w).sin(), X, use_reentrant=False)
        return y.sum()

    ((_, (inputs, delta)),) = seen(loss, W).items()
    torch.testing.assert_close(inputs, X)
    torch.testing.assert_close(delta, linear(X, W).cos())
