"""The inputs and output gradients of the linear maps in a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from hyperopt_peft.utils.autograd import needs_plain_operations
from hyperopt_peft.utils.vector import widened

MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass(frozen=True)
class Layer:
    """The linear map y = xWᵀ + c, given by the indices of its variables.

    ``weight`` is the index of W and ``bias`` the index of c; None if the tensor is not a variable.
    ``transposed`` is true for y = x @ V, where the variable is V = Wᵀ: ``(in, out)`` or ``(in,)``.
    """

    weight: int | None
    bias: int | None = None
    transposed: bool = False

    def matrix(self, parts: Sequence[Tensor]) -> Tensor:
        """The layer's entries of ``parts`` as [W c], ``(out, in + 1)``, or W or c alone."""
        columns = []
        if self.weight is not None:
            weight = parts[self.weight]
            weight = weight[:, None] if weight.dim() == 1 else weight
            columns.append(weight.mT if self.transposed else weight)
        if self.bias is not None:
            columns.append(parts[self.bias].reshape(-1, 1))
        return torch.cat(columns, 1) if len(columns) > 1 else columns[0]

    def assign_(self, parts: Sequence[Tensor], matrix: Tensor) -> None:
        """Write ``matrix``, as returned by `matrix`, into the layer's entries of ``parts``."""
        if self.bias is not None:
            parts[self.bias].copy_(matrix[:, -1].view_as(parts[self.bias]))
            matrix = matrix[:, :-1]
        if self.weight is not None:
            weight = matrix.mT if self.transposed else matrix
            parts[self.weight].copy_(weight.reshape(parts[self.weight].shape))

    def inputs(self, x: Tensor) -> Tensor:
        """x for W, 1 for c, or (x, 1) for both: ``(…, columns of the matrix)``."""
        ones = x.new_ones(*x.shape[:-1], 1)
        columns = [x] if self.weight is not None else []
        return torch.cat([*columns, ones], -1) if self.bias is not None else x


class LinearCalls(TorchFunctionMode):
    """Records calls of ``linear`` and ``x @ V`` whose weight or bias is one of ``variables``.

    Half precision is widened. Calls inside `torch.func` transforms and calls on nested tensors are
    ignored.
    """

    def __init__(self, variables: Sequence[Tensor]) -> None:
        super().__init__()
        self._number = {id(variable): k for k, variable in enumerate(variables)}
        self._calls: dict[tuple[Layer, int], list[tuple[Tensor, Tensor]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (func is linear or func in MATMUL) and not needs_plain_operations():
            call = _of_linear if func is linear else _of_matmul
            x, layer = call(self._number, *args, **kwargs)
            if layer is not None and result.requires_grad and not x.is_nested and x.numel():
                result.register_hook(partial(self._see, layer, x.detach()))
        return result

    def _see(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        rows = len(x) if x.dim() > 1 else 1
        if layer.transposed and gradient.dim() < x.dim():
            gradient = gradient[..., None]  # V is (in,)
        inputs, delta = (
            widened(values.detach()).reshape(rows, -1, values.shape[-1])
            for values in (layer.inputs(x), gradient)
        )
        self._calls.setdefault((layer, rows), []).append((inputs, delta))

    def rows(self) -> dict[tuple[Layer, int], tuple[Tensor, Tensor]]:
        """Inputs ``(rows, tokens, in)`` and output gradients, by layer and number of rows.

        Rows are the first dimension of an input; tokens are the dimensions between the first and
        the last. Several calls of a layer with the same number of rows are joined as tokens.
        """
        return {
            key: (torch.cat([x for x, _ in calls], 1), torch.cat([delta for _, delta in calls], 1))
            for key, calls in self._calls.items()
        }


def _of_linear(
    number: dict[int, int], input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Layer | None]:
    layer = Layer(number.get(id(weight)), number.get(id(bias)), weight.dim() == 1)
    return input, None if layer.weight is layer.bias else layer


def _of_matmul(
    number: dict[int, int], input: Tensor, other: Tensor, **_: Any
) -> tuple[Tensor, Layer | None]:
    index = number.get(id(other))
    of_weights = id(input) in number  # such as B @ A
    unknown = index is None or of_weights or other.dim() > 2
    return input, None if unknown else Layer(index, transposed=True)


@contextmanager
def linear_calls(variables: Sequence[Tensor]) -> Iterator[LinearCalls]:
    """Record the linear maps of forward and backward passes in the body."""
    # With a hook, layers that are one autograd function (`use_fast_dora`) run PyTorch's operations.
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    with hook, LinearCalls(variables) as calls:
        yield calls
