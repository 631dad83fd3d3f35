"""An estimator's state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

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
    """The inverse of `packed`, on the devices and shards of the lower ``variables``."""

    def vector(parts: Sequence[Tensor]) -> Vector:
        return Vector(  # a vector may have a wider dtype than the variable
            sharded_like(x, v) if is_sharded(v) else x.to(v.device)
            for x, v in zip(parts, variables, strict=True)
        )

    return {k: vector(value) if isinstance(value, list) else value for k, value in state.items()}
