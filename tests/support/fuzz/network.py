"""The networks of the forms, and their functions with backward passes of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, scaled_dot_product_attention

from tests.support.fuzz.grammar import WIDTH, Form


class _Square(Function):
    """x + x²/4, whose backward pass is differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + x.square() / 4

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * (1 + x / 2)


class _Once(_Square):
    backward = staticmethod(once_differentiable(_Square.backward))


class _NoSecond(_Square):
    """As `_Square`, with a constant in the backward pass in place of x."""

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * (1 + x.detach() / 2)


FUNCTIONS = {"right": _Square, "once": _Once, "no second": _NoSecond}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(1, 6), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.unsqueeze(-1)).chunk(3, -1)
        return self.out(scaled_dot_product_attention(q, k, v)).squeeze(-1)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 2)
        for column in x.split(1, dim=1):
            state = self.cell(column, state)
        return torch.cat([state, x[:, 2:]], dim=1)


class _Embedded(nn.Module):
    """x plus the embedding of the row's class, which is the sign of the first number."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.weight, self.sparse = nn.Parameter(torch.zeros(2, WIDTH)), sparse

    def forward(self, x: Tensor) -> Tensor:
        return x + embedding((x[..., 0] > 0).long(), self.weight, sparse=self.sparse)


class _Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _WeightNorm(nn.Module):
    """A linear layer in PyTorch's weight normalisation, or in the same by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.g, self.v = nn.Parameter(torch.ones(WIDTH, 1)), nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            return x @ (self.g * self.v / self.v.norm(dim=1, keepdim=True)).T
        return x @ torch._weight_norm(self.v, self.g, 0).T


class Network(nn.Module):
    """Rows ``(n, 3)`` to numbers ``(n,)``; ``mask`` is a dropout mask of the hidden layer."""

    def __init__(self, form: Form, *, plain: bool) -> None:
        super().__init__()
        self.form, self.plain = form, plain
        linear = nn.Linear(WIDTH, WIDTH)
        kinds = {
            "attention": _Attention,
            "conv": lambda: nn.Sequential(
                nn.Unflatten(-1, (1, WIDTH)), nn.Conv1d(1, 1, 3, padding=1), nn.Flatten(-2)
            ),
            "gru": _Recurrent,
            "embedding": lambda: _Embedded(form.meddling == "sparse" and not plain),
        }
        self.first = kinds[form.first]() if form.first in kinds else linear
        second = {
            "linear": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
            "tied": lambda: linear,
            "layernorm": lambda: nn.LayerNorm(WIDTH),
            "batchnorm": lambda: nn.BatchNorm1d(WIDTH),
            "scale": _Factor,
            "none": nn.Identity,
        }
        self.second = second[form.second]()
        self.third = _WeightNorm(plain) if form.function == "weight_norm" else nn.Identity()
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = getattr(nn.functional, self.form.activation)(self.first(x)) * mask
        if self.form.first == "tied":
            hidden = self.first(hidden)
        hidden = self.third(self.second(hidden)) + x
        if (function := FUNCTIONS.get(self.form.function)) is not None:
            hidden = hidden + hidden.square() / 4 if self.plain else function.apply(hidden)
        return self.last(hidden).squeeze(-1)
