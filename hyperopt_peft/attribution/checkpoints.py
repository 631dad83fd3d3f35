"""The points of a run from which its steps are done again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

#: The values of a run's variables, and the state of each level's optimizer by the level's number.
Point = tuple[tuple[Tensor, ...], Mapping[int, Any]]


class Checkpoints:
    """The variables and the optimizers' states before each ``every``-th step.

    They are in memory where ``every`` is 1, and in files of a temporary folder otherwise, so that
    the memory of a run does not grow with its length.

    Example:
        >>> points = Checkpoints(every=2)
        >>> points.put(4, ((torch.ones(1),), {0: {}}))
        >>> points.due(4), points.due(5), points.get(4)
        (True, False, ((tensor([1.]),), {0: {}}))
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._points: dict[int, Point] = {}
        self._folder = None if every == 1 else TemporaryDirectory(prefix="attribution-")

    def due(self, step: int) -> bool:
        """Whether there is to be a checkpoint before ``step``."""
        return step % self.every == 0

    def put(self, step: int, point: Point) -> None:
        """Store ``point``, where variables and optimizers were before ``step``."""
        if self._folder is None:
            self._points[step] = point
        else:
            torch.save(point, Path(self._folder.name) / f"{step}.pt")

    def get(self, step: int) -> Point:
        """The point that was stored before ``step``."""
        if self._folder is None:
            return self._points[step]
        point: Point = torch.load(Path(self._folder.name) / f"{step}.pt", weights_only=True)
        return point
