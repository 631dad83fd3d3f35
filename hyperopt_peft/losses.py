"""What a level's loss returned: its scalar, its metrics, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.graph import graph_nodes, is_half


def loss_and_metrics(result: Any, level: str) -> tuple[Tensor, dict[str, float]]:
    """The scalar of ``result``, with its graph, and the other single numbers in it.

    Raises:
        ProblemError: it is no real scalar, or depends on nothing that requires a gradient.
    """
    metrics: dict[str, float] = {}
    if isinstance(result, Mapping):
        if "loss" not in result:
            raise ProblemError(
                f'{level}: loss returned a mapping without "loss", only {list(result)}'
            )
        metrics = {k: _plain(v) for k, v in result.items() if k != "loss" and is_number(v)}
        result = result["loss"]
    if not isinstance(result, Tensor) or result.numel() != 1 or result.is_complex():
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ProblemError(f"{level}: loss must be a real scalar tensor, got {shape}")
    if not result.requires_grad:
        raise ProblemError(
            f"{level}: the loss does not depend on any tensor that requires a gradient; "
            "look for detach(), .item(), torch.no_grad() or frozen variables"
        )
    return result.reshape(()), metrics


def runs_in_half(loss: Tensor, level: str) -> bool:
    """Whether a pass behind ``loss`` is in half precision, as its graph shows.

    Raises:
        ProblemError: reentrant gradient checkpointing hides the graph.
    """
    nodes = list(graph_nodes([loss]))
    if any("CheckpointFunction" in node.name() for node in nodes):
        raise ProblemError(
            f"{level}: reentrant gradient checkpointing hides variables from the "
            'loss; enable it with gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    return any(is_half(node) for node in nodes)


def lacking(batch: Any, error: Exception) -> str:
    """What ``batch`` lacks, if that is why a loss raised ``error``; else empty."""
    if batch is None and "NoneType" in str(error):
        return f"the loss was given no batch ({error}); give the level data, or the call a batch"
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if not isinstance(key, str) or not isinstance(batch, Mapping) or key in batch:
        return ""
    return (
        f"the loss reads {key!r}, and the batch has only {', '.join(map(str, batch))}; "
        "the Trainer takes out what the model does not read, unless remove_unused_columns=False"
    )


def is_number(value: Any) -> bool:
    """Whether ``value`` is one real number, as a Python number or a tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
