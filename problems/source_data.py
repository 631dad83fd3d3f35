"""The training rows of several sources and the trusted rows, as `MixTrainer` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from torch import Tensor
from transformers.utils import logging

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.data_sources import SOURCE
from hyperopt_peft.problems.votes import NO_VOTE, VOTES, one_source_more, one_vote, voted
from hyperopt_peft.trainer.data import joined, label_column, require_examples, shared
from hyperopt_peft.utils.groups import group_rows

#: The name of the trusted rows among the sources.
TRUSTED = "trusted"
#: How far the sum of a source's probabilities may be from 1, or from 0 for no vote.
TOLERANCE = 1e-3
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class SourceData:
    """Rows with their sources, of which the trusted rows are the last one.

    Attributes:
        names: the sources, then ``trusted``.
        sources: the rows of all sources. The column ``source`` has the number of each row's source,
            or ``votes``, a list of a class for each source, -1 for none, or of a list of
            probabilities for each, all 0 for none.
        trusted: the trusted rows, with the same columns.
        trusted_votes: the `votes` of the sources on the trusted rows, if they are known.
    """

    names: tuple[str, ...]
    sources: Dataset
    trusted: Dataset
    trusted_votes: Tensor | None = None

    @classmethod
    def of(cls, sources: Mapping[str, Dataset] | Dataset, trusted: Dataset) -> SourceData:
        """The data of ``sources``, data sets by name, or one data set with the column ``votes``.

        Raises:
            ProblemError: one source alone; a source without rows; data sets of different columns;
                trusted rows that are in a source too; or no trusted rows.
        """
        require_examples(TRUSTED, trusted)
        if not isinstance(trusted, Dataset):
            raise ProblemError(f"trusted: must be a datasets.Dataset, got {type(trusted).__name__}")
        if isinstance(sources, Dataset) and VOTES in sources.column_names:
            data = cls(*_of_votes(sources, trusted))
        else:
            data = cls(*_of_names(sources, trusted))
        outside = {label_column(trusted), SOURCE, VOTES}  # a row leaks with another label too
        columns = [name for name in data.trusted.column_names if name not in outside]
        if common := shared(data.trusted.select_columns(columns), data.sources):
            raise ProblemError(
                f"trusted: {common} of {len(trusted)} rows are in a source too, so that they judge "
                "what was trained on them; remove them from the sources"
            )
        return data

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows, or votes, of each source, by name."""
        if VOTES in self.sources.column_names:
            numbers = voted(torch.tensor(self.everything[VOTES][:])).sum(0)
        else:
            numbers = torch.tensor(self.everything[SOURCE][:]).bincount(minlength=len(self.names))
        return dict(zip(self.names, numbers.tolist(), strict=True))

    @property
    def everything(self) -> Dataset:
        """The rows of the sources, then the trusted ones."""
        return joined(sources=self.sources, trusted=self.trusted)

    @property
    def parts(self) -> dict[str, Dataset]:
        """The rows of each source by name, and the trusted ones; rows with votes are one part."""
        if VOTES in self.sources.column_names:
            return {VOTES: self.sources, TRUSTED: self.trusted}
        tables = by_column(self.sources, SOURCE)
        parts = {self.names[int(number)]: rows for number, rows in tables.items()}
        return {**parts, TRUSTED: self.trusted.remove_columns(SOURCE)}

    def with_sources(self, rows: Sequence[int]) -> SourceData:
        """The data with these rows of the sources alone."""
        return replace(self, sources=self.sources.select(rows))

    def with_votes(self, votes: Tensor) -> SourceData:
        """The data with ``votes`` of K + 1 sources in place of the sources', and rows with one."""
        rows = self.sources.remove_columns(VOTES).add_column(VOTES, votes.tolist())
        made = replace(self, sources=rows)
        return made.with_sources(voted(votes).any(1).nonzero().flatten().tolist())

    def with_trusted(self, rows: Sequence[int]) -> SourceData:
        """The data with these trusted rows alone."""
        votes = None if self.trusted_votes is None else self.trusted_votes[list(rows)]
        return replace(self, trusted=self.trusted.select(rows), trusted_votes=votes)


def by_column(rows: Dataset, column: str) -> dict[str, Dataset]:
    """The rows of each value of ``column``, without the column, by the value.

    Raises:
        ProblemError: there is no such column.

    Example:
        >>> rows = Dataset.from_dict({"x": [0, 1, 2], "origin": ["wiki", "code", "wiki"]})
        >>> {name: each["x"][:] for name, each in by_column(rows, "origin").items()}
        {'wiki': [0, 2], 'code': [1]}
    """
    if column not in rows.column_names:
        raise ProblemError(f"column {column!r}: the rows have only {rows.column_names}")
    groups = group_rows(rows[column])
    rows = rows.remove_columns(column)
    return {name: rows.select(numbers) for name, numbers in groups.items()}


def _of_names(sources: Any, trusted: Dataset) -> tuple[tuple[str, ...], Dataset, Dataset]:
    if not isinstance(sources, Mapping) or len(sources) < 2 or TRUSTED in sources:
        names = sorted(sources) if isinstance(sources, Mapping) else type(sources).__name__
        raise ProblemError(
            "sources: must map two or more names to data sets, or be one data set with the "
            f"column {VOTES!r}; none is named {TRUSTED!r}; got {names}"
        )
    if SOURCE in trusted.column_names:
        raise ProblemError(
            f"column {SOURCE!r}: has the number of a row's source here; rename or remove it"
        )
    for name, rows in sources.items():
        require_examples(f"source {name!r}", rows)
        if set(rows.column_names) != set(trusted.column_names):
            raise ProblemError(
                f"source {name!r}: has the columns {sorted(rows.column_names)}, and the "
                f"trusted rows {sorted(trusted.column_names)}; give both the same ones"
            )
    *numbered, last = (
        rows.add_column(SOURCE, [number] * len(rows), feature=Value("int64"))
        for number, rows in enumerate((*sources.values(), trusted))
    )
    return (*sources, TRUSTED), joined(**dict(zip(sources, numbered, strict=True))), last


def _votes(rows: Dataset) -> Tensor:
    try:
        votes = torch.from_numpy(np.array(rows[VOTES][:]))
    except (TypeError, ValueError):  # lists of different lengths; strings
        votes = torch.empty(0)
    if votes.dim() == 3 and votes.shape[1] >= 2:
        sums = votes.sum(-1)
        if votes.min() >= 0 and torch.minimum(sums, (sums - 1).abs()).max() < TOLERANCE:
            return (votes * (sums > 0.5)[..., None]).float()
    integers = votes.dim() == 2 and votes.shape[1] >= 2 and votes.dtype == torch.int64
    if not integers or votes.min() < NO_VOTE:
        raise ProblemError(
            f"column {VOTES!r}: must have a list of a class for each of two or more sources, "
            f"{NO_VOTE} for none, or of probabilities for each, whose sum is 1, or 0 for none"
        )
    return votes


def _of_votes(
    rows: Dataset, trusted: Dataset
) -> tuple[tuple[str, ...], Dataset, Dataset, Tensor | None]:
    votes, of_sources = _votes(rows), None
    if VOTES in trusted.column_names:
        of_sources = _votes(trusted)
        if of_sources.shape[1:] != votes.shape[1:]:
            raise ProblemError(
                f"column {VOTES!r}: those of a trusted row have the shape "
                f"{tuple(of_sources.shape[1:])}, and of the others {tuple(votes.shape[1:])}"
            )
        trusted = trusted.remove_columns(VOTES)
    label = label_column(trusted)
    dtype = getattr(trusted.features.get(label), "dtype", None)
    if label is None or "int" not in str(dtype):
        raise ProblemError(
            f"trusted: must have a column 'label' or 'labels' of classes, got {trusted.features}"
        )
    if (silent := (~voted(votes).any(0)).nonzero()).numel():
        raise ProblemError(f"source {silent[0, 0]}: has no votes; leave its entry out of {VOTES!r}")
    some = voted(votes).any(1)
    if not some.all():
        logger.warning("%d of %d rows have no vote, and are left out", (~some).sum(), len(some))
        rows, votes = rows.select(some.nonzero().flatten().tolist()), votes[some]
    votes = one_source_more(votes)
    classes = torch.tensor(trusted[label][:])
    if votes.dim() == 3 and int(classes.max()) >= votes.shape[2]:
        raise ProblemError(
            f"column {VOTES!r}: has {votes.shape[2]} probabilities a source, and a trusted row the "
            f"class {int(classes.max())}"
        )
    # A batch needs a label a row, which the loss of votes does not read: the first vote.
    first = votes[torch.arange(len(votes)), voted(votes).int().argmax(1)]
    if label not in rows.column_names:
        labels = (first.argmax(1) if first.dim() == 2 else first).tolist()
        rows = rows.add_column(label, labels, feature=trusted.features[label])
    rows = rows.remove_columns(VOTES).add_column(VOTES, votes.tolist())
    of_trusted = one_vote(votes, classes, votes.shape[1] - 1)
    trusted = trusted.add_column(VOTES, of_trusted.tolist())
    common = [name for name in rows.column_names if name in trusted.column_names]
    names = (*map(str, range(votes.shape[1] - 1)), TRUSTED)
    return names, rows.select_columns(common), trusted.select_columns(common), of_sources
