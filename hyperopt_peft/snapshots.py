"""An optimizer as it was before a step: what differentiating the step needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor


def snapshot(optimizer: Any, variables: Sequence[Tensor], *, with_state: bool) -> dict[str, Any]:
    """The options of ``optimizer`` for ``variables`` and, if asked for, copies of its state.

    ``"kind"``: the optimizer's class. ``"groups"``: the options of each parameter group that
    holds some of ``variables``, with ``"variables"``, the positions of these. ``"state"``: by
    position, the tensors that the optimizer keeps for that variable.
    """
    position = {id(variable): index for index, variable in enumerate(variables)}
    groups = [
        {key: deepcopy(value) for key, value in group.items() if key != "params"}
        | {"variables": [position[id(x)] for x in group["params"] if id(x) in position]}
        for group in optimizer.param_groups
    ]
    kept = optimizer.state.items() if with_state else ()
    return {
        "kind": type(getattr(optimizer, "optimizer", optimizer)),  # accelerate wraps it
        "groups": [group for group in groups if group["variables"]],
        "state": {position[id(x)]: deepcopy(state) for x, state in kept if id(x) in position},
    }
