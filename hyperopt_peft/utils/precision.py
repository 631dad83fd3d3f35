"""Single-precision passes over a model whose weights or operations are in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.autograd import HALF, recomputed_in_other_dtypes
from hyperopt_peft.utils.vector import widened

_CASTS: dict[Any, Callable[..., Tensor]] = {
    torch.Tensor.bfloat16: torch.Tensor.float,
    torch.Tensor.half: torch.Tensor.float,
}


class SinglePrecision(TorchFunctionMode):
    """Every operation that would run in bfloat16 or float16 runs in float32.

    A finite difference divides rounding errors by its step; at the 8 bits of bfloat16 the result
    would be all rounding. Half-precision arguments are converted to float32, casts to half
    precision become casts to float32, and autocast is off.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # An argument that the function writes to must not be replaced by a copy.
        written = 1 if _writes(getattr(func, "__name__", "")) else 0
        targets, args = args[:written], args[written:]
        args, kwargs = tree_map(_widened, (args, kwargs))
        with ExitStack() as stack:
            for device in _autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            return _CASTS.get(func, func)(*targets, *args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return widened(value)
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def _writes(name: str) -> bool:
    """Whether a tensor function of this name changes its first argument."""
    if name.startswith("__") and name.endswith("__"):
        return name in ("__set__", "__setitem__") or (
            name.startswith("__i") and name not in ("__int__", "__index__", "__invert__")
        )
    return name.endswith("_")


def _autocast_devices() -> list[str]:
    return [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]


def autocast_enabled() -> bool:
    """Whether autocast is enabled, on any device."""
    return bool(_autocast_devices())


@contextmanager
def single_precision(variables: tuple[Tensor, ...]) -> Iterator[None]:
    """Within the body, ``variables`` are float32 and operations run in `SinglePrecision`.

    Afterwards the variables have their half-precision data again, bit for bit.

    Raises:
        ProblemError: gradient checkpointing recomputes a half-precision part of the loss.
    """
    narrow = [(variable, variable.data) for variable in variables if variable.dtype in HALF]
    try:
        for variable, data in narrow:
            variable.data = data.float()
        with SinglePrecision():
            yield
    except RuntimeError as error:
        if not recomputed_in_other_dtypes(error):
            raise
        raise ProblemError(
            "gradient checkpointing: the backward pass recomputes half-precision parts of the "
            "loss, which must run in float32; turn it off, or load the model in float32"
        ) from error
    finally:
        for variable, data in narrow:
            variable.data = data
