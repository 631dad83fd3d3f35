"""Optimizer options as functions of upper variables, and copies of optimizer states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.autograd import graph_leaves

#: The optimizer options that can be functions of upper variables.
DIFFERENTIABLE = ("lr", "weight_decay")


def options_by_group(level: Any) -> list[dict[str, Tensor]]:
    """``level.optimizer_options()``, one mapping for each parameter group of the optimizer.

    The values are scalar tensors with their autograd graphs.
    """
    options = level.optimizer_options()
    if not options:
        return []
    if level.optimizer is None:
        raise ProblemError(f"{level.name}: optimizer_options need an optimizer; give the level one")
    groups = level.optimizer.param_groups
    options = [options] * len(groups) if isinstance(options, Mapping) else list(options)
    if len(options) != len(groups):
        raise ProblemError(
            f"{level.name}: optimizer_options has {len(options)} mappings for {len(groups)} groups "
            "of parameters; return one for each group, or one for all"
        )
    return [{name: _number(level, name, value) for name, value in o.items()} for o in options]


def present_options(level: Any) -> list[dict[str, float]]:
    """The current values of `options_by_group`, as numbers."""
    groups = options_by_group(level)
    return [{name: float(value.detach()) for name, value in o.items()} for o in groups]


def write_options(level: Any) -> None:
    """Write the current values of ``level.optimizer_options()`` into the optimizer's groups."""
    if options := present_options(level):
        for group, values in zip(level.optimizer.param_groups, options, strict=True):
            group.update(values)


def read_by_options(level: Any) -> set[int]:
    """The ids of the leaf tensors that the optimizer options of ``level`` depend on."""
    values = [value for group in options_by_group(level) for value in group.values()]
    return {id(leaf) for value in values if value.requires_grad for leaf in graph_leaves(value)}


def _number(level: Any, name: str, value: Tensor | float) -> Tensor:
    if name not in DIFFERENTIABLE:
        raise ProblemError(
            f"{level.name}: optimizer_options has {name!r}; only "
            f"{' and '.join(DIFFERENTIABLE)} can be functions of variables"
        )
    if name == "lr" and level.scheduler is not None:
        raise ProblemError(
            f"{level.name}: both the scheduler and optimizer_options set the learning rate; "
            "remove one of them"
        )
    real = isinstance(value, Tensor) and value.is_floating_point()
    number = torch.as_tensor(value, dtype=None if real else torch.float64)
    if number.numel() != 1 or not (math.isfinite(number.detach()) and number >= 0):
        shown = number.item() if number.numel() == 1 else f"shape {tuple(number.shape)}"
        raise ProblemError(
            f"{level.name}: {name} in optimizer_options must be a finite number ≥ 0, got {shown}; "
            "use the exponential of a variable"
        )
    return number.reshape(())


def optimizer_state_copy(level: Any, *, with_state: bool) -> dict[str, Any]:
    """Copies of the options and the state of the optimizer of ``level``.

    ``"kind"`` is the optimizer's class or None; ``"groups"`` has the present options of each
    parameter group that is not empty, with the positions of its ``"variables"``; ``"state"`` has
    the optimizer's state of each variable (such as its momentum), by the variable's position.
    """
    optimizer = level.optimizer
    if optimizer is None:
        return {"kind": None, "groups": [], "state": {}}
    position = {id(variable): index for index, variable in enumerate(level.variables)}
    options = present_options(level) or [{}] * len(optimizer.param_groups)
    groups = [
        {key: deepcopy(value) for key, value in group.items() if key != "params"}
        | {**values, "variables": [position[id(x)] for x in group["params"] if id(x) in position]}
        for group, values in zip(optimizer.param_groups, options, strict=True)
    ]
    states = optimizer.state.items() if with_state else ()
    return {
        "kind": type(getattr(optimizer, "optimizer", optimizer)),  # accelerate wraps it
        "groups": [group for group in groups if group["variables"]],
        "state": {position[id(x)]: deepcopy(state) for x, state in states if id(x) in position},
    }
