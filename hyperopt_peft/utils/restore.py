"""Restoring variables, buffers, gradients and random states after evaluations of a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hyperopt_peft.utils.distributed import to_local
from hyperopt_peft.utils.random_state import RandomState


class Buffers:
    """The buffers of the modules that run, with their values before the first forward pass.

    ``modules`` has all modules that have run, with or without buffers.
    """

    def __init__(self) -> None:
        self.modules: set[nn.Module] = set()
        self._seen: dict[tuple[int, str], tuple[nn.Module, Tensor | None, Tensor | None]] = {}

    def see(self, module: nn.Module, _inputs: object) -> None:
        """Forward pre-hook: copy the module's buffers before its first forward pass."""
        self.modules.add(module)
        for name, buffer in module._buffers.items():
            key = id(module), name
            if key not in self._seen:
                before = None if buffer is None else buffer.detach().clone()
                self._seen[key] = (module, buffer, before)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore every buffer that was changed in place, replaced, or created."""
        pairs = [
            (buffer, before)
            for _, buffer, before in self._seen.values()
            if buffer is not None and before is not None
        ]
        if pairs:  # all, since a write through ``.data`` does not increment ``_version``
            buffers, before = zip(*pairs, strict=True)
            torch._foreach_copy_(buffers, before)
        for (_, name), (module, buffer, _) in self._seen.items():
            module._buffers[name] = buffer


@contextmanager
def preserve_state(
    variables: Sequence[Tensor], devices: Sequence[torch.device]
) -> Iterator[Buffers]:
    """Restore ``.grad``, buffers and random states after the body, even after an exception.

    The buffers (such as BatchNorm's statistics) belong to every module whose forward pass runs.
    """
    buffers = Buffers()
    random_state = RandomState.capture(devices)
    grads = [variable.grad for variable in variables]
    for variable in variables:
        variable.grad = None
    try:
        with nn.modules.module.register_module_forward_pre_hook(buffers.see):
            yield buffers
    finally:
        buffers.restore()
        for variable, grad in zip(variables, grads, strict=True):
            variable.grad = grad
        random_state.restore()


class TensorPool:
    """Copies of variables in reused memory, since allocation would take longer than the copy."""

    def __init__(self) -> None:
        self._free: list[tuple[Tensor, ...]] = []

    def take(self, variables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A copy of ``variables``."""
        copies = self._free.pop() if self._free else ()
        if [(x.dtype, x.device) for x in copies] != [(x.dtype, x.device) for x in variables]:
            copies = tuple(torch.empty_like(x, requires_grad=False) for x in variables)
        assign_(copies, variables)
        return copies

    def give_back(self, copies: tuple[Tensor, ...]) -> None:
        """Reuse the memory of ``copies``, a result of `take`, for a later copy."""
        self._free.append(copies)


@contextmanager
def perturbed(
    variables: Sequence[Tensor], copies: TensorPool | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Restore ``variables`` after the body, which may change them in place.

    Yields copies of their values before the body, in memory from the pool ``copies``.
    """
    copies = copies or TensorPool()
    saved = copies.take(variables)
    try:
        yield saved
    finally:
        assign_(variables, saved)
        copies.give_back(saved)


@torch.no_grad()
def assign_(
    variables: Sequence[Tensor],
    values: Sequence[Tensor],
    direction: Sequence[Tensor] = (),
    length: float = 0.0,
) -> None:
    """variables ← values + length·direction, in place."""
    variables, values, direction = map(to_local, (variables, values, direction))
    torch._foreach_copy_(variables, values)
    if direction:
        torch._foreach_add_(variables, direction, alpha=length)
