"""Options of a level's optimizer that are functions of upper variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.autograd import graph_leaves

if TYPE_CHECKING:
    from hyperopt_peft.core.problem import Problem

LEARNT = ("lr", "weight_decay")


def options_by_group(level: Problem) -> list[dict[str, Tensor]]:
    """What ``level.optimizer_options()`` says, for each group of the optimizer's parameters.

    The numbers keep their graphs.

    Raises:
        ProblemError: an option other than ``lr`` and ``weight_decay``, a value that is no finite
            number from 0, another number of mappings than of groups, no optimizer, or a learning
            rate beside a scheduler, which sets it too.
    """
    given = level.optimizer_options()
    if not given:
        return []
    if level.optimizer is None:
        raise ProblemError(f"{level.name}: there are optimizer_options, but no optimizer")
    groups = level.optimizer.param_groups
    options = [given] * len(groups) if isinstance(given, Mapping) else list(given)
    if len(options) != len(groups):
        raise ProblemError(
            f"{level.name}: optimizer_options has {len(options)} mappings for {len(groups)} groups "
            "of parameters; return one for each group, or one for all"
        )
    return [{name: _number(level, name, value) for name, value in o.items()} for o in options]


def present_options(level: Problem) -> list[dict[str, float]]:
    """The values of `options_by_group` at the moment."""
    return [
        {name: float(value.detach()) for name, value in options.items()}
        for options in options_by_group(level)
    ]


def write_options(level: Problem) -> None:
    """Write the present values of ``level.optimizer_options()`` into the optimizer's groups."""
    options = present_options(level)
    if options and level.optimizer is not None:
        for group, values in zip(level.optimizer.param_groups, options, strict=True):
            group.update(values)


def read_by_options(level: Problem) -> set[int]:
    """The ids of the leaves that the level's options are functions of."""
    values = [value for group in options_by_group(level) for value in group.values()]
    return {id(leaf) for value in values if value.requires_grad for leaf in graph_leaves(value)}


def _number(level: Problem, name: str, value: Tensor | float) -> Tensor:
    if name not in LEARNT:
        raise ProblemError(
            f"{level.name}: optimizer_options can set {' and '.join(LEARNT)}, not {name!r}"
        )
    if name == "lr" and level.scheduler is not None:
        raise ProblemError(
            f"{level.name}: both the scheduler and optimizer_options set the learning rate; "
            "leave one out"
        )
    real = isinstance(value, Tensor) and value.is_floating_point()
    number = torch.as_tensor(value, dtype=None if real else torch.float64)
    if number.numel() != 1 or not (math.isfinite(number.detach()) and number >= 0):
        shown = number.item() if number.numel() == 1 else f"shape {tuple(number.shape)}"
        raise ProblemError(
            f"{level.name}: {name} must be a finite number from 0, optimizer_options gives {shown};"
            " the exponential of a variable is always positive"
        )
    return number.reshape(())


def optimizer_state_copy(
    optimizer: Any,
    variables: Sequence[Tensor],
    *,
    with_state: bool,
    options: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """The options of ``optimizer`` for ``variables`` and, if asked for, copies of its state.

    ``"kind"``: the optimizer's class. ``"groups"``: the options of each parameter group that
    holds some of ``variables``, with ``"variables"``, the positions of these; ``options`` has for
    each group those that take the place of its own. ``"state"``: by position, the tensors that
    the optimizer keeps for that variable.
    """
    position = {id(variable): index for index, variable in enumerate(variables)}
    groups = [
        {key: deepcopy(value) for key, value in group.items() if key != "params"}
        | {**given, "variables": [position[id(x)] for x in group["params"] if id(x) in position]}
        for group, given in zip(
            optimizer.param_groups, options or [{}] * len(optimizer.param_groups), strict=True
        )
    ]
    kept = optimizer.state.items() if with_state else ()
    return {
        "kind": type(getattr(optimizer, "optimizer", optimizer)),  # accelerate wraps it
        "groups": [group for group in groups if group["variables"]],
        "state": {position[id(x)]: deepcopy(state) for x, state in kept if id(x) in position},
    }
