"""A collator that hands the sources of rows on, as a number a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.data_sources import SOURCE


@dataclass(frozen=True)
class SourceCollator:
    """Calls ``collate`` without the rows' sources, and adds these to its batch.

    A collator makes what it knows, so that most drop other columns. ``source`` is a number for each
    label of the batch: of its row, or, where the collator makes one row of all (padding-free),
    of the row that has the token. Where labels are numbers with a fraction, it is a number a row.
    Rows without sources, and their batch, are those of ``collate``.

    Raises:
        ProblemError: the batch has as many rows as none of the two layouts.

    Example:
        >>> def flat(rows):
        ...     ids = torch.tensor([sum((row["input_ids"] for row in rows), [])])
        ...     return {"input_ids": ids, "labels": ids}
        >>> rows = [{"input_ids": [5, 6, 7], "source": 1}, {"input_ids": [8], "source": 0}]
        >>> SourceCollator(flat)(rows)["source"]
        tensor([[1, 1, 1, 0]])
    """

    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of ``rows``."""
        if SOURCE not in rows[0]:
            return self.collate(rows)
        source = torch.tensor([row[SOURCE] for row in rows])
        batch = self.collate([{k: v for k, v in row.items() if k != SOURCE} for row in rows])
        return {**batch, SOURCE: _of_labels(source, batch, rows)}


def _of_labels(source: Tensor, batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() == 1 or labels.is_floating_point():
        return source
    if len(labels) == len(rows):
        return source[:, None].expand_as(labels).contiguous()
    lengths = torch.tensor([len(row.get("input_ids", ())) for row in rows])
    padding = labels.shape[1] - int(lengths.sum())
    if len(labels) != 1 or padding < 0:
        raise ProblemError(
            f"column {SOURCE!r}: the data collator makes labels of shape {tuple(labels.shape)} of "
            f"{len(rows)} rows with {int(lengths.sum())} tokens, so that a label has no source; "
            "use one that pads the rows, or writes them one after another"
        )
    lengths[-1] += padding  # of the end, which is not scored
    return source.repeat_interleave(lengths)[None]
