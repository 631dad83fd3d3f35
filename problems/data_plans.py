"""Baselines for data sources and a few trusted rows, without an upper level.

min over the adapter w   Σ_k p_k L_k(w),   L_k the mean loss of source k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Value
from torch import Tensor

from hyperopt_peft.method import (
    Batch,
    Collate,
    Method,
    Model,
    ProblemError,
    TaskLoss,
    WeightedRows,
    joined,
    label_counts,
    option,
    require_examples,
)

SOURCE, TRUSTED = "source", "trusted"


@dataclass
class EqualSources(Method):
    """Each source has the same share p_k = 1/K; the rows of ``upper_dataset`` are a further source.

    Raises:
        ProblemError: the rows lack the column, or have one source alone.

    Example:
        >>> rows = Dataset.from_dict({"x": [1, 2, 3], "source": ["web", "books", "web"]})
        >>> EqualSources().rows(rows, None)[0]["source"][:]
        [0, 1, 0]
    """

    column: str = option(SOURCE, help="of the training rows, names the source of each")

    tags = (SOURCE,)

    def rows(self, train: Dataset, upper: Dataset | None) -> tuple[Any, Any]:
        """All rows with the numbers of their sources, and the trusted rows."""
        columns = getattr(train, "column_names", None) or ()
        given = train[self.column][:] if self.column in columns else []
        if None in given:
            raise ProblemError(f"column {self.column!r}: row {given.index(None)} has no source")
        values = list(map(str, given))
        self.names = list(dict.fromkeys(values))
        if len(self.names) < 2 or TRUSTED in self.names:
            raise ProblemError(
                f"column {self.column!r}: must name two or more sources in the training rows, and "
                f"none {TRUSTED!r}, got {self.names}"
            )
        train = self._numbered(train, [self.names.index(value) for value in values])
        if upper is None:
            return train, None
        upper = self._numbered(upper, [len(self.names)] * len(upper))
        self.names.append(TRUSTED)
        return joined(train_dataset=train, upper_dataset=upper), upper

    def _numbered(self, rows: Dataset, numbers: list[int]) -> Dataset:
        rows = rows.remove_columns([x for x in {self.column, SOURCE} if x in rows.column_names])
        return rows.add_column(SOURCE, numbers, feature=Value("int64"))

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The rows of the lower level, which include the trusted rows."""
        return train

    def read_rows(self, model: Model, rows: Dataset, collate: Collate) -> None:
        """Count the labels n_k of each source."""
        self.counts = label_counts(SOURCE, len(self.names), model, rows, collate)

    def p(self) -> Tensor:
        """The share of each source in the training loss, ``(K,)``; their sum is 1."""
        return torch.full((len(self.names),), 1 / len(self.names))

    def shares(self) -> dict[str, float]:
        """As `p`, by the names of the sources."""
        return dict(zip(self.names, self.p().tolist(), strict=True))

    def weights(self, batch: Batch) -> Tensor:
        """v of each row or label of a batch, of the shape of its ``source``."""
        p = self.p().to(batch[SOURCE].device)
        counts = self.counts.to(p)
        return (p * counts.sum() / counts.clamp(min=1))[batch[SOURCE]]

    def lower(self, model: Model, task_loss: TaskLoss) -> WeightedRows:
        """Σ_k p_k L_k over the trainable parameters of ``model``."""
        return WeightedRows(model, self.weights, tags=self.tags, row_losses=self.row_losses)


@dataclass
class SomeSources(Method):
    """The rows of some sources and of ``upper_dataset``, with equal weights.

    Raises:
        ProblemError: no row is of a chosen source, or no row is left.

    Example:
        >>> rows = Dataset.from_dict({"x": [1, 2, 3], "source": ["web", "books", "web"]})
        >>> SomeSources(["web"]).all_rows(rows, None)["x"][:]
        [1, 3]
    """

    chosen: list[str] = option(default_factory=list, help="by default none, the trusted rows alone")
    column: str = option(SOURCE, help="the column that names the source of a row")

    def all_rows(self, train: Any, upper: Any) -> Any:
        """The rows of the chosen sources, in their order, then the trusted ones."""
        columns = getattr(train, "column_names", None) or ()
        values = list(map(str, train[self.column][:])) if self.column in columns else []
        if unknown := [name for name in self.chosen if name not in values]:
            raise ProblemError(
                f"chosen: no training row has {unknown[0]!r} in column {self.column!r}; its "
                f"sources are {list(dict.fromkeys(values))}"
            )
        if not self.chosen:
            require_examples("upper_dataset", upper)
            return upper
        rows = train.select([k for k, value in enumerate(values) if value in self.chosen])
        return super().all_rows(rows, upper)
