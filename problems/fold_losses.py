"""What the folds of the trusted rows say of each method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: A method, and the setting with which it is tried.
Run = tuple[str, float]


@dataclass
class FoldLosses:
    """Losses of the ``rows`` trusted rows, each by models that are trained without its fold.

    Attributes:
        rows: n.
        losses: of each run, ``(n,)``.
        passes: the passes of each run in a fold.
        row_weights: of each fold the learned weights of a row, by source.
        untrained: the losses of a model that has learned nothing of a row, ``(n,)``.
    """

    rows: int
    losses: dict[Run, Tensor] = field(default_factory=dict)
    passes: dict[Run, int] = field(default_factory=dict)
    row_weights: list[dict[str, float]] = field(default_factory=list)
    untrained: Tensor | None = None

    def add(self, run: Run, rows: Tensor, losses: Tensor, passes: int) -> None:
        """Take the ``losses`` of the ``rows`` of a fold, by ``run``."""
        self.losses.setdefault(run, torch.zeros(self.rows))[rows] = losses
        self.passes[run] = passes
