"""The DoRA layer, and BiDoRA's step on MiniLM, beside PEFT's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.speed.dora_layer import single_layer
from benchmarks.speed.gpu.machine import Machine
from benchmarks.speed.timing import UNIT, steps, timed

#: The rounds of runs that take milliseconds.
MANY = 20


def layer(machine: Machine) -> Iterator[dict[str, Any]]:
    """Forward and backward of one layer in bfloat16, few tokens and many."""
    width, tokens = (64, [32]) if machine.small else (4096, [256, 4096])
    rounds = machine.rounds if machine.small else MANY
    for count in tokens:
        yield single_layer(width, count, rounds, machine.device, torch.bfloat16)


def step(machine: Machine) -> Iterator[dict[str, Any]]:
    """BiDoRA's steps, by a training step of PEFT's DoRA."""
    size, length = (4, 8) if machine.small else (32, 64)
    runs, lower = steps(size, length, machine.device, *([("direct",)] if machine.small else []))
    rounds = machine.rounds if machine.small else MANY
    yield from timed(runs, rounds, machine.device, UNIT, lower)
