"""Exact products of losses that cannot be differentiated twice: an error, and no wrong number."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import ProblemError, hypergradient
from tests.support.language import language_model
from tests.support.quadratic import FunctionLevel

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


def levels(loss: Any, w: Tensor) -> tuple[FunctionLevel, FunctionLevel]:
    u = torch.ones((), requires_grad=True)
    return FunctionLevel(lambda _: loss(w), [u]), FunctionLevel(lambda _: u * loss(w), [w])


@pytest.mark.parametrize("method", ["cg", "darts:product=exact", "unrolled:steps=2"])
def test_a_head_of_trl_that_makes_no_logits(method: str) -> None:
    trl = pytest.importorskip("trl")
    model = language_model()
    trl.trainer.utils.add_fused_lm_head(model)
    ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    w = model.model.norm.weight

    def loss(_: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, fused_lm_head=True).loss

    upper, lower = levels(loss, w)
    lower.optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(ProblemError, match=ADVICE):
        hypergradient(upper, lower, method)


def test_a_function_of_liger() -> None:
    """Its second derivative would be taken for zero, without an error."""
    namespace: dict[str, Any] = {"__name__": "liger_kernel.ops.square"}
    exec(SQUARE, namespace)
    loss = namespace["Square"].apply
    with pytest.raises(ProblemError, match=ADVICE):
        hypergradient(*levels(lambda w: loss(w).sum(), torch.ones(2, requires_grad=True)), "cg")
