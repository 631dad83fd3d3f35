"""Passes in a higher precision than a model's weights or operations have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.autograd import HALF

_CASTS = (torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.float)

NO_FLOAT32 = (
    "second derivatives and differences of a loss in half precision run in float32; choose "
    'direct or product=dots, or load the model with attn_implementation="sdpa"'
)


class SinglePrecision(TorchFunctionMode):
    """Every operation that would run in bfloat16 or float16 runs in float32.

    A finite difference divides rounding errors by its step, and with the 8 bits of bfloat16 the
    result would be nothing but rounding. Half-precision arguments are converted to float32, casts
    to half precision become casts to float32, and autocast is off. This includes backward passes,
    where gradient checkpoints run parts of the forward pass again.
    """

    dtype = torch.float32
    narrow: tuple[torch.dtype, ...] = HALF

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with ExitStack() as stack:
            for device in autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            if func in _ENGINE:
                return _ENGINE[func](self, *args, **kwargs)
            # An argument that the function writes to must not become a copy.
            written = 1 if _writes(getattr(func, "__name__", "")) else 0
            targets, args = args[:written], args[written:]
            out = {key: value for key, value in kwargs.items() if key == "out"}
            args, kwargs = tree_map(self._widened, (args, kwargs))
            if func in _CASTS:
                func, args = torch.Tensor.to, (*args, self.dtype)
            return func(*targets, *args, **{**kwargs, **out})

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.dtype in self.narrow else value
        return self.dtype if isinstance(value, torch.dtype) and value in self.narrow else value


class DoublePrecision(SinglePrecision):
    """Every operation that would run in a lower precision runs in float64."""

    dtype = torch.float64
    narrow = (*HALF, torch.float32)


# PyTorch disables a mode while the mode handles a function. The functions below run autograd's
# engine with the mode active, on gradient edges, since tensors would call the mode again.


def _backward(
    mode: SinglePrecision,
    tensors: Tensor | Iterable[Tensor],
    grad_tensors: Any = None,
    inputs: Any = None,
    **options: Any,
) -> None:
    """`torch.autograd.backward`."""
    if inputs is not None:
        inputs = _tensors(inputs)
        for tensor in inputs:
            tensor.retain_grad()  # as the engine does for tensors that are not leaves
        inputs = _edges(inputs)
    outputs = _edges(tensors)
    with mode:
        torch.autograd.backward(outputs, grad_tensors, inputs=inputs, **options)


def _tensor_backward(
    mode: SinglePrecision, tensor: Tensor, gradient: Tensor | None = None, **options: Any
) -> None:
    """`torch.Tensor.backward`."""
    _backward(mode, tensor, gradient, **options)


def _grad(
    mode: SinglePrecision,
    outputs: Tensor | Iterable[Tensor],
    inputs: Any,
    materialize_grads: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`."""
    if materialize_grads:  # torch.autograd.grad does not support it for edges
        options["allow_unused"] = True
    inputs = _tensors(inputs)
    edges = _edges(outputs), _edges(inputs)
    with mode:
        gradients = torch.autograd.grad(*edges, **options)
    if not materialize_grads:
        return gradients
    differentiable = bool(options.get("create_graph"))
    return tuple(
        torch.zeros_like(x, requires_grad=differentiable) if gradient is None else gradient
        for x, gradient in zip(inputs, gradients, strict=True)
    )


_ENGINE: dict[Any, Callable[..., Any]] = {
    torch.Tensor.backward: _tensor_backward,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
}


def _tensors(tensors: Any) -> tuple[Tensor, ...]:
    if isinstance(tensors, dict):
        tensors = tensors.values()
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _edges(tensors: Any) -> tuple[GradientEdge, ...]:
    return tuple(map(get_gradient_edge, _tensors(tensors)))


def _writes(name: str) -> bool:
    """Whether a tensor function of this name changes its first argument."""
    if name.startswith("__") and name.endswith("__"):
        return name in ("__set__", "__setitem__") or (
            name.startswith("__i") and name not in ("__int__", "__index__", "__invert__")
        )
    return name.endswith("_")


def autocast_devices() -> list[str]:
    """The kinds of devices on which autocast is enabled."""
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


@contextmanager
def single_precision(
    variables: tuple[Tensor, ...], mode: type[SinglePrecision] = SinglePrecision
) -> Iterator[None]:
    """Within the body, operations run in ``mode``, and ``variables`` have its dtype or a wider one.

    The variables are restored bit for bit afterwards.

    Raises:
        ProblemError: an operation, such as FlashAttention, does not support float32.
    """
    narrow = [(variable, variable.data) for variable in variables if variable.dtype in mode.narrow]
    try:
        for variable, data in narrow:
            variable.data = data.to(mode.dtype)
        with mode():
            yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("fp16", "bf16", "float16", "half")):
            raise
        raise ProblemError(f"the loss: {error}; {NO_FLOAT32}") from error
    finally:
        for variable, data in narrow:
            variable.data = data
        torch.clear_autocast_cache()  # its casts have graphs that no longer reach the variables


def require_float32(model: nn.Module) -> None:
    """Raise ProblemError if ``model`` uses Transformers' FlashAttention, which has no float32."""
    for module in model.modules():
        name = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if "flash" in str(name):
            raise ProblemError(f"{type(module).__name__}: {name} has no float32; {NO_FLOAT32}")
