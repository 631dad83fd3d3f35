"""A penalty beside a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import is_sharded


def regularised(task: Any, weight: float, penalty: Callable[[Any], Tensor], model: Any) -> Any:
    """L + weight·penalty(model), with both terms as metrics; L alone where ``weight`` is 0.

    Raises:
        ProblemError: FSDP2 shards the model.
    """
    if weight == 0:
        return task
    if is_sharded(*model.parameters()):
        raise ProblemError(
            "penalty: it reads parameters outside of the model's forward pass, where FSDP2 has "
            "shards only; set its weight to 0, or train without FSDP2"
        )
    value = penalty(model)
    return {"loss": task + weight * value, "task_loss": task, "penalty": value}
