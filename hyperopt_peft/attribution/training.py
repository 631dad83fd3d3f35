"""A training with a weight for each row, which can be done again with other weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor


class Training(ABC):
    """What scores and their check need of a training: its end, and the end with other weights.

    Attributes:
        weights: the rows' weights v, ``(n,)``, a leaf that requires a gradient.
        row_weights: the weights of the training that was done.
        variables: what is trained.
        steps: the steps of its optimizers.
        visits: how many steps saw each row, ``(n,)``.
        losses: the sum of each row's losses in them, ``(n,)`` in float64.
        settings: the time that it took under ``seconds``, and what else is to be known of it.
    """

    def __init__(self, weights: Tensor, variables: Sequence[Tensor] = ()) -> None:
        self.weights, self.row_weights = weights, weights.detach().clone()
        self.variables, self.steps = tuple(variables), list[Any]()
        self.visits = torch.zeros(len(weights), dtype=torch.int64)
        self.losses = torch.zeros(len(weights), dtype=torch.float64)
        self.settings = dict[str, Any]()

    @abstractmethod
    def repeated(self, weights: Tensor) -> AbstractContextManager[Any]:
        """The training again, with ``weights`` for v: in the body variables and v are its end's.

        Raises:
            NonFiniteError: the training diverges.
        """

    @contextmanager
    def without(self, rows: Sequence[int] | Tensor) -> Iterator[None]:
        """The training again, with the weight 0 for ``rows``; otherwise as `repeated`."""
        weights = self.row_weights.clone()
        weights[rows] = 0.0
        with self.repeated(weights):
            yield
