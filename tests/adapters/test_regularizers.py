import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from hyperopt_peft.adapters import dora_layers, gram_penalty
from hyperopt_peft.adapters.layers import direction
from hyperopt_peft.adapters.regularizers import gram
from tests.support.adapted_models import dora_bert, randomise, single


def random_matrix(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, dtype=torch.float64, generator=generator)


def dense_gram(v: Tensor) -> Tensor:
    """The definition."""
    d = v / torch.linalg.vector_norm(v, dim=0)
    return torch.linalg.matrix_norm(d.T @ d - torch.eye(v.shape[1], dtype=v.dtype))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_value_and_gradient(out_features: int, in_features: int, seed: int) -> None:
    v = random_matrix(out_features, in_features, seed).requires_grad_()
    torch.testing.assert_close(gram(v), dense_gram(v), rtol=1e-9, atol=1e-7)
    if in_features > 1:
        (grad,) = torch.autograd.grad(gram(v), v)
        (expected,) = torch.autograd.grad(dense_gram(v), v)
        torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_derivatives(shape: tuple[int, int]) -> None:
    v = random_matrix(*shape).requires_grad_()
    assert gradcheck(gram, (v,))
    assert gradgradcheck(gram, (v,))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_a_zero_column_counts_as_missing(shape: tuple[int, int]) -> None:
    v = random_matrix(*shape)
    v[:, 0] = 0
    v.requires_grad_()
    value = gram(v)
    torch.testing.assert_close(value.square(), 1 + dense_gram(v.detach()[:, 1:]).square())
    (grad,) = torch.autograd.grad(value, v, create_graph=True)
    assert torch.equal(grad[:, 0], torch.zeros(shape[0]).double())
    (second,) = torch.autograd.grad(grad.square().sum(), v)
    assert second.isfinite().all() and second.abs().sum() > 0


def test_the_gradient_is_zero_at_the_minimum() -> None:
    v = torch.eye(4, 3, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(gram(v), v, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(2, 300_000), (300_000, 2)])
def test_only_the_smaller_gram_matrix_is_built(shape: tuple[int, int]) -> None:
    """The larger one would take 720 GB."""
    assert gram(random_matrix(*shape)).isfinite()


def test_the_penalty_is_the_mean_over_modules() -> None:
    model = randomise(dora_bert(target_modules=["query", "intermediate.dense"]))
    values = [dense_gram(direction(layer, "default")) for _, layer in dora_layers(model)]
    assert len(values) == 4
    torch.testing.assert_close(gram_penalty(model), sum(values) / 4)


@pytest.mark.parametrize("kind", ["conv1d_gpt2", "embedding", "conv2d"])
def test_the_penalty_reaches_the_factors_and_nothing_else(kind: str) -> None:
    model = randomise(single(kind))
    gram_penalty(model).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(touched) == 2 and all("_A" in name or "_B" in name for name in touched)
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name in touched)


def test_plain_lora_has_a_direction_too() -> None:
    lora, dora = randomise(single(use_dora=False)), randomise(single())
    torch.testing.assert_close(gram_penalty(lora), gram_penalty(dora))
