"""Exact products of losses that cannot be differentiated twice: an error, and no wrong number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hyperopt_peft import ProblemError, hypergradient
from tests.support.language import fuse_head, language_model
from tests.support.quadratic import FunctionLevel, Once

SQUARE = '''
import torch

class Square(torch.autograd.Function):
    """x², with a backward pass whose kernel autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        return (2 * ctx.saved_tensors[0] * slope).detach()
'''
ADVICE = 'no second derivative.*choose product="difference"'


Loss = Callable[[Tensor, Tensor], Tensor]


def levels(loss: Loss, w: Tensor) -> tuple[FunctionLevel, FunctionLevel]:
    u = torch.randn_like(w, requires_grad=True)
    upper = FunctionLevel(lambda _: w.square().sum() + u.sum(), [u])
    return upper, FunctionLevel(lambda _: loss(w, u), [w], lr=0.1)


def flash(w: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(w, w, w)


def liger(w: Tensor) -> Tensor:
    """Its second derivative would be taken for zero, without an error."""
    namespace: dict[str, Any] = {"__name__": "liger_kernel.ops.square"}
    exec(SQUARE, namespace)
    return namespace["Square"].apply(w)


LOSSES: dict[str, Loss] = {
    "flash attention": lambda w, u: (flash(w) * u).sum() + w.square().sum(),
    "once differentiable": lambda w, u: (Once.apply(w) * u).sum() + w.square().sum(),
    # The function's output gradient does not depend on w, so that autograd raises no error.
    "at the end": lambda w, u: Once.apply(w - u).sum(),
    "Liger": lambda w, u: u.square().sum() * liger(w).sum(),
}


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@pytest.mark.parametrize("method", ["darts", "cg"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_exact_products_are_refused_and_differences_work(loss: Loss, method: str) -> None:
    both = levels(loss, torch.randn(1, 2, 3, 4, requires_grad=True))
    hypergradient(*both, f"{method}:product=difference")
    with pytest.raises(ProblemError, match=ADVICE):
        hypergradient(*both, f"{method}:product=exact")


@pytest.mark.parametrize("method", ["cg", "darts:product=exact", "unrolled:steps=2"])
def test_a_head_of_trl_that_makes_no_logits(method: str) -> None:
    model = language_model()
    fuse_head(model)
    ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))

    def loss(_: Tensor, u: Tensor) -> Tensor:
        return u.sum() * model(input_ids=ids, labels=ids, fused_lm_head=True).loss

    with pytest.raises(ProblemError, match=ADVICE):
        hypergradient(*levels(loss, model.model.norm.weight), method)


class Fails(Once):
    """Its backward pass has an error of its own."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("out of patience")


@pytest.mark.parametrize("method", ["darts:product=exact", "darts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_error_of_the_loss_stays_what_it_is(method: str, dtype: torch.dtype) -> None:
    """Advice on second derivatives or on precision would send the user the wrong way."""
    w = torch.randn(3, dtype=dtype, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^out of patience$"):
        hypergradient(*levels(lambda w, u: Fails.apply(w * u).sum(), w), method)
