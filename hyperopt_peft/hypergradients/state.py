"""An estimator's state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.oracle import State
from hyperopt_peft.utils.distributed import gather, is_sharded, sharded_like
from hyperopt_peft.utils.vector import Vector


def packed(state: State) -> dict[str, Any]:
    """A copy of ``state`` as numbers and lists of full (unsharded) tensors."""
    return {
        key: [gather(part).clone() for part in value] if isinstance(value, Vector) else value
        for key, value in state.items()
    }


def unpacked(state: Mapping[str, Any], variables: Sequence[Tensor]) -> State:
    """The inverse of `packed`, on the devices and shards of the lower ``variables``, checked."""
    if not isinstance(state, Mapping):
        raise ProblemError(f"the estimator's state: must be a mapping, got {state!r}")
    shapes = [tuple(variable.shape) for variable in variables]
    result: dict[str, Vector | float] = {}
    for key, value in state.items():
        if isinstance(value, int | float):
            result[key] = value
        elif isinstance(value, list) and [tuple(getattr(x, "shape", ())) for x in value] == shapes:
            # A vector may have a wider dtype than the variable.
            result[key] = Vector(
                sharded_like(x, v) if is_sharded(v) else x.to(v.device)
                for x, v in zip(value, variables, strict=True)
            )
        else:
            raise ProblemError(
                f"the estimator's state: {key!r} does not have the shapes of the lower variables; "
                "use a state of the same levels"
            )
    return result
