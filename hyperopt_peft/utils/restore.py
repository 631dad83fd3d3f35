"""Evaluations that leave no trace: everything a hypergradient touches is put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hyperopt_peft.utils.distributed import to_local
from hyperopt_peft.utils.random_state import RandomState


class Buffers:
    """The buffers of the modules that run, as they were before they ran."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], tuple[nn.Module, Tensor | None, Tensor | None]] = {}

    def see(self, module: nn.Module, _inputs: object) -> None:
        """Forward pre-hook: remember the module's buffers before it can change them."""
        for name, buffer in module._buffers.items():
            key = id(module), name
            if key not in self._seen:
                before = None if buffer is None else buffer.detach().clone()
                self._seen[key] = (module, buffer, before)

    def changed(self) -> list[str]:
        """Those that are not as they were, as ``Module.buffer``."""
        return [
            f"{type(module).__name__}.{name}"
            for (_, name), (module, _, before) in self._seen.items()
            if not _equal(module._buffers[name], before)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, changed in place, replaced, or made where there was None."""
        pairs = [
            (buffer, before)
            for _, buffer, before in self._seen.values()
            if buffer is not None and before is not None
        ]
        if pairs:  # all of them: a write through ``.data`` leaves no trace
            buffers, before = zip(*pairs, strict=True)
            torch._foreach_copy_(buffers, before)
        for (_, name), (module, buffer, _) in self._seen.items():
            module._buffers[name] = buffer


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@contextmanager
def preserve_state(
    variables: Sequence[Tensor], devices: Sequence[torch.device]
) -> Iterator[Buffers]:
    """Run the body and put back ``.grad``s, buffers and random states, exceptions included.

    Buffers (BatchNorm's statistics) are found by watching which modules run, so a loss may
    reach its modules in any way.
    """
    buffers = Buffers()
    random_state = RandomState.capture(devices)
    grads = [variable.grad for variable in variables]
    for variable in variables:
        variable.grad = None
    hook = nn.modules.module.register_module_forward_pre_hook(buffers.see)
    try:
        yield buffers
    finally:
        hook.remove()
        buffers.restore()
        for variable, grad in zip(variables, grads, strict=True):
            variable.grad = grad
        random_state.restore()


class TensorPool:
    """Copies of some variables, in memory that is used again: fresh pages cost more than a copy."""

    def __init__(self) -> None:
        self._free: list[tuple[Tensor, ...]] = []

    def take(self, variables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A copy of ``variables``, the same ones each time."""
        copies = self._free.pop() if self._free else ()
        if [(x.dtype, x.device) for x in copies] != [(x.dtype, x.device) for x in variables]:
            copies = tuple(torch.empty_like(x, requires_grad=False) for x in variables)
        assign_(copies, variables)
        return copies

    def give_back(self, copies: tuple[Tensor, ...]) -> None:
        """Allow the memory of ``copies``, which `take` gave, to be used for others."""
        self._free.append(copies)


@contextmanager
def perturbed(
    variables: Sequence[Tensor], copies: TensorPool | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Let the body move ``variables``, with `assign_`; then put them back by copy, bit for bit.

    Yields copies of where they were.
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
    """Move ``variables`` in place to values + length·direction."""
    torch._foreach_copy_(to_local(variables), to_local(values))
    if direction:
        torch._foreach_add_(to_local(variables), to_local(direction), alpha=length)
