"""The DoRA layer and BiDoRA's step on MiniLM, beside PEFT's, as `timing` measures them."""

from __future__ import annotations

from typing import Any

from benchmarks.speed import timing
from benchmarks.speed.gpu.machine import Machine


def layer(machine: Machine) -> list[dict[str, Any]]:
    """Forward and backward of the model, and the memory that it keeps."""
    return timing.layer_table(*machine.batch, machine.device, machine.many)


def step(machine: Machine) -> list[dict[str, Any]]:
    """BiDoRA's steps, by a training step of PEFT's DoRA."""
    estimators = ("direct",) if machine.small else timing.ESTIMATORS
    return timing.step_table(*machine.batch, machine.device, machine.many, estimators)
