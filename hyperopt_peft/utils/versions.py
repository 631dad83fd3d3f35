"""Whether a value computed from tensors may be kept for as long as their versions stand.

Autograd counts the in-place writes to a tensor in ``_version``, but a write through ``.data`` or
by an optimizer's own kernel (8-bit optimizers) leaves no trace there. So nothing is kept unless
every write of a span of time is known to move a version: inside `tracked`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from hyperopt_peft.utils.distributed import is_sharded

_SPAN: ContextVar[object | None] = ContextVar("span", default=None)


@contextmanager
def tracked(variables: Iterable[Tensor] = ()) -> Iterator[None]:
    """Promise that every write to a parameter in the body moves its version; see `bump`.

    Nothing is promised where any of ``variables`` is sharded: gathering them again does not.
    """
    token = _SPAN.set(None if is_sharded(*variables) else _SPAN.get() or object())
    try:
        yield
    finally:
        _SPAN.reset(token)


def span() -> object | None:
    """What identifies the `tracked` body that is running, None where none is."""
    return _SPAN.get()


def bump(tensors: Iterable[Tensor]) -> None:
    """Move the versions of ``tensors``, after a write that may not have done so."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


class Snapshot:
    """Recognises tensors that are, and hold, what they were and held when it was taken.

    It keeps their memory alive, so that no other tensor can be mistaken for one of them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._seen = tuple((x.detach(), x._version) for x in tensors)

    def matches(self, tensors: Iterable[Tensor]) -> bool:
        """Whether ``tensors`` are the same memory in the same dtype, at the same versions."""
        return all(
            x.data_ptr() == seen.data_ptr() and x.dtype == seen.dtype and x._version == version
            for x, (seen, version) in zip(tensors, self._seen, strict=True)
        )
