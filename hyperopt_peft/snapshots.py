"""An optimizer as it was before a step: what differentiating the step needs to know."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from hyperopt_peft.errors import ProblemError


def snapshot(
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


def require_known(level: str, taken: Mapping[str, Any], known: Collection[type]) -> None:
    """Raise ProblemError unless ``taken``, of ``level``'s optimizer, is of a ``known`` kind.

    There the form of a step is known, but not with ``amsgrad`` or ``maximize``.
    """
    kind = taken["kind"]
    if kind is None:
        raise ProblemError(
            f"{level}: the estimator differentiates or reads the optimizer's step, and the level "
            "has no optimizer; give it one"
        )
    if kind not in known:
        raise ProblemError(
            f"{level}: the form of {kind.__name__}'s step is not known; use one of "
            f"{', '.join(each.__name__ for each in known)}"
        )
    for flag in ("amsgrad", "maximize"):
        if any(group.get(flag) for group in taken["groups"]):
            raise ProblemError(f"{level}: the form of a step with {flag} is not known; turn it off")
