"""Whether a value computed from tensors may be kept for as long as their versions stand.

Autograd counts the in-place writes to a tensor in ``_version``, but a write through ``.data`` or
by an optimizer's own kernel (8-bit optimizers) leaves no trace there. So nothing is kept unless
every write of a span of time is known to be counted: inside `counted`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_SPAN: ContextVar[object | None] = ContextVar("span", default=None)


@contextmanager
def counted() -> Iterator[None]:
    """Promise that every write to a parameter in the body moves its version; see `wrote`."""
    token = _SPAN.set(_SPAN.get() or object())
    try:
        yield
    finally:
        _SPAN.reset(token)


def span() -> object | None:
    """What identifies the `counted` body that is running, None where none is."""
    return _SPAN.get()


def wrote(tensors: Iterable[Tensor]) -> None:
    """Move the versions of ``tensors``, after a write that may not have done so."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def state_of(*tensors: Tensor) -> tuple[tuple[int, int, torch.dtype], ...]:
    """What changes whenever a counted write changes a tensor, or its memory is replaced."""
    return tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
