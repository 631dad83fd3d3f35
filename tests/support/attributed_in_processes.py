"""An attribution of one process, or of two with half of each batch each."""

from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tests.support.attributed import levels, scored

ESTIMATORS = ("unrolled", "unrolled:product=difference", "minres:damping=0.1", "gradient")


def results(processes: int = 1, rank: int = 0) -> dict[str, Any]:
    """Scores by estimator, with and without files for checkpoints, and a check."""
    tensors: dict[str, Any] = {}
    for estimator in ESTIMATORS:
        tensors[estimator] = scored(levels_of(processes, rank), estimator=estimator).scores
    result = scored(levels_of(processes, rank), memory_limit=1e-5)
    check = result.check(5, share=0.2)
    tensors |= {"files": result.scores, "actual": check.actual, "smooth": check.metasmoothness}
    return tensors


def levels_of(processes: int, rank: int) -> Any:
    """Levels without dropout, whose masks would differ, on this process's share of each batch."""
    lower, weights, evaluation = levels(clip=0.2, scheduled=True)
    lower.net[2].p = 0.0  # type: ignore[attr-defined]
    batches = [torch.arange(k, k + 4).chunk(processes)[rank] for k in (0, 4, 8)]
    assert lower.batches is not None
    lower.batches.data = batches
    return lower, weights, evaluation


def work(folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    return results(dist.get_world_size(), dist.get_rank())
