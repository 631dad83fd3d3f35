"""What an estimator keeps between two upper steps, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.oracle import State
from hyperopt_peft.utils.distributed import gather, is_sharded, sharded_like
from hyperopt_peft.utils.vector import Vector


def packed(state: State) -> dict[str, Any]:
    """``state`` as numbers and lists of whole tensors, in memory of their own."""
    return {
        key: [gather(part).clone() for part in value] if isinstance(value, Vector) else value
        for key, value in state.items()
    }


def unpacked(state: Mapping[str, Any], variables: Sequence[Tensor]) -> State:
    """What `packed` made, on the devices and shards of the lower ``variables``.

    Raises:
        ProblemError: no mapping, or an entry is neither a number nor shaped like ``variables``.
    """
    if not isinstance(state, Mapping):
        raise ProblemError(f"what the estimator kept must be a mapping, got {state!r}")
    shapes = [tuple(variable.shape) for variable in variables]
    result: dict[str, Vector | float] = {}
    for key, value in state.items():
        if isinstance(value, int | float):
            result[key] = value
        elif isinstance(value, list) and [tuple(getattr(x, "shape", ())) for x in value] == shapes:
            result[key] = Vector(_placed(x, v) for x, v in zip(value, variables, strict=True))
        else:
            raise ProblemError(f"the estimator's {key!r} is not that of these lower variables")
    return result


def _placed(whole: Tensor, like: Tensor) -> Tensor:
    """``whole`` where ``like`` is, in its own dtype: a vector is wider than half precision."""
    return sharded_like(whole, like) if is_sharded(like) else whole.to(like.device)
