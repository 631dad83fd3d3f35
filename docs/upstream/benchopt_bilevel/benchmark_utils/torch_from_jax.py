"""A function in JAX as one in torch that can be differentiated any number of times."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import Tensor


def to_jax(tensor: Tensor) -> jax.Array:
    """An array with the values of ``tensor``."""
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def to_torch(array: jax.Array) -> Tensor:
    """A copy, which torch may write to; arrays are immutable."""
    return torch.from_dlpack(array).clone()


def torch_from_jax(function: Callable[..., jax.Array]) -> Callable[..., Tensor]:
    """``function(index, *arrays)``, whose value is a scalar, with tensors for arrays.

    The index, such as the first row of a batch, is passed on as it is.
    """

    @jax.jit
    def as_tuple(index: Any, *arrays: jax.Array) -> tuple[jax.Array]:
        return (function(index, *arrays),)

    def call(index: Any, *tensors: Tensor) -> Tensor:
        (value,) = _FromJax.apply(as_tuple, index, *tensors)
        return value

    return call


@functools.cache
def _pullback(function: Callable[..., Any], inputs: int) -> Callable[..., Any]:
    """The vector-Jacobian product of ``function``; a function of the same kind, compiled once."""

    @jax.jit
    def pullback(index: Any, *arrays: jax.Array) -> Any:
        at, cotangents = arrays[:inputs], arrays[inputs:]
        return jax.vjp(functools.partial(function, index), *at)[1](cotangents)

    return pullback


class _FromJax(torch.autograd.Function):
    """A node whose backward pass is a node of the same kind."""

    @staticmethod
    def forward(ctx: Any, function: Any, index: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.index = function, index
        ctx.save_for_backward(*tensors)
        return tuple(map(to_torch, function(index, *map(to_jax, tensors))))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        tensors = ctx.saved_tensors
        function = _pullback(ctx.function, len(tensors))
        return None, None, *_FromJax.apply(function, ctx.index, *tensors, *cotangents)
