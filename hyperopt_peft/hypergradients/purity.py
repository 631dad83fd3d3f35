"""Evaluations that leave no trace: everything a hypergradient touches is put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hyperopt_peft.hypergradients.precision import HALF
from hyperopt_peft.random_state import RandomState


@dataclass
class Witness:
    """What the modules that ran during a hypergradient were seen to be.

    ``half`` is True once one of them held half-precision parameters or ran under autocast.
    """

    half: bool = False
    buffers: dict[int, tuple[Tensor, Tensor, int]] = field(default_factory=dict)

    def see(self, module: nn.Module, _inputs: object) -> None:
        """Forward pre-hook: remember the module's buffers before it can change them."""
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in self.buffers:
                self.buffers[id(buffer)] = (buffer, buffer.detach().clone(), buffer._version)
        parameters = module._parameters.values()
        self.half = (
            self.half
            or any(parameter is not None and parameter.dtype in HALF for parameter in parameters)
            or torch.is_autocast_enabled("cpu")
            or torch.is_autocast_enabled("cuda")
        )


@contextmanager
def unchanged(variables: Sequence[Tensor], devices: Sequence[torch.device]) -> Iterator[Witness]:
    """Run the body and put back ``.grad``s, buffers and random states, exceptions included.

    Buffers (BatchNorm's statistics) are found by watching which modules run, so a loss may
    reach its modules in any way.
    """
    witness = Witness(half=any(variable.dtype in HALF for variable in variables))
    random_state = RandomState.capture(devices)
    grads = [variable.grad for variable in variables]
    for variable in variables:
        variable.grad = None
    hook = nn.modules.module.register_module_forward_pre_hook(witness.see)
    try:
        yield witness
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, before, version in witness.buffers.values():
                if buffer._version != version:
                    buffer.copy_(before)
        for variable, grad in zip(variables, grads, strict=True):
            variable.grad = grad
        random_state.restore()


@contextmanager
def displaced(variables: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Hold ``variables`` at ``values``; afterwards they are restored by copy, bit for bit."""
    saved = [variable.detach().clone() for variable in variables]
    try:
        _assign(variables, values)
        yield
    finally:
        _assign(variables, saved)


@torch.no_grad()
def _assign(variables: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.copy_(value)
