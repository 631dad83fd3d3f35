"""Random folds of rows."""

from __future__ import annotations

import torch
from sklearn.model_selection import KFold
from torch import Tensor


def folds_of(rows: Tensor, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The other rows and the rows of each of ``count`` random folds of ``rows``.

    Example:
        >>> [sorted(fold.tolist()) for _, fold in folds_of(torch.tensor([4, 5, 6]), 3)]
        [[6], [5], [4]]
    """
    splits = KFold(count, shuffle=True, random_state=seed).split(rows)
    return [(rows[torch.from_numpy(rest)], rows[torch.from_numpy(fold)]) for rest, fold in splits]
