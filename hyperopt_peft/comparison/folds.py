"""Which rows train a run, and which score it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.model_selection import KFold, ShuffleSplit

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import digests, require_examples, shared, split_dataset


@dataclass(frozen=True)
class Rows:
    """The rows of a comparison, and their division for each run.

    Attributes:
        train: of the lower level.
        upper: the trusted rows, or None.
        test: score the reported runs; None with ``folds``.
        folds: K parts of the trusted rows, each of which scores a seed of K.
        held_out: the share of the rows that scores development runs, of the trusted ones where
            there are some.
        spare: whether folds leave a further part out, which scores the development runs alone.
        parts: the seeds that score a part of ``test`` each, where a training has no random part
            and seeds would otherwise be equal.
    """

    train: Any
    upper: Any = None
    test: Any = None
    folds: int | None = None
    held_out: float = 0.2
    spare: bool = True
    parts: Sequence[int] = ()

    def check(self) -> None:
        """Raise ProblemError where a row that scores is one that trains."""
        if (self.test is None) == (self.folds is None):
            raise ProblemError("test_dataset: give either test_dataset or folds")
        if self.folds is not None:
            require_examples("upper_dataset", self.upper)
            trusted, least = len(self.upper), self.folds + self.spare
            if self.folds < 2 or least > trusted:
                raise ProblemError(
                    f"folds: {self.folds} of {trusted} trusted rows; give 2 to "
                    f"{trusted - self.spare}"
                )
            if again := trusted - len({*digests(self.upper, self.upper.column_names)}):
                raise ProblemError(
                    f"upper_dataset: {again} rows are there twice, in two folds; remove them"
                )
        scored = "upper_dataset" if self.test is None else "test_dataset"
        rows = self.upper if self.test is None else self.test
        pairs = {"training": self.train, "trusted": None if self.test is None else self.upper}
        for name, others in pairs.items():
            if common := shared(rows, others):
                raise ProblemError(
                    f"{scored}: {common} of {len(rows)} rows are {name} rows; remove them"
                )

    def of(self, seed: int, development: bool) -> tuple[Any, Any, Any]:
        """The rows (lower level, trusted, scoring) of a run.

        Example:
            >>> from datasets import Dataset
            >>> trusted = Dataset.from_dict({"x": range(6)})
            >>> rows = Rows(Dataset.from_dict({"x": [9]}), trusted, folds=3, spare=False)
            >>> sorted(x for seed in range(3, 6) for x in rows.of(seed, False)[2]["x"])
            [0, 1, 2, 3, 4, 5]
        """
        if self.folds is not None:
            return self.train, *self._fold(seed, development, self.folds)
        if self.parts:
            part = self.test.shard(len(self.parts), self.parts.index(seed), contiguous=False)
            return self.train, self.upper, part
        if not development:
            return self.train, self.upper, self.test
        if self.upper is None:
            lower, scored = split_dataset(self.train, self.held_out, seed)
            return lower, None, scored
        halves = ShuffleSplit(1, test_size=self.held_out, random_state=seed).split(self.upper)
        rest, held = next(halves)
        return self.train, _taken(self.upper, rest), _taken(self.upper, held)

    def _fold(self, seed: int, development: bool, folds: int) -> tuple[Any, Any]:
        rest, spare = np.arange(len(self.upper)), np.arange(0)
        if self.spare:
            rest, spare = next(KFold(folds + 1, shuffle=True, random_state=0).split(rest))
        if development:
            return _taken(self.upper, rest), _taken(self.upper, spare)
        parts = KFold(folds, shuffle=True, random_state=seed // folds).split(rest)
        train, fold = [*parts][seed % folds]
        return _taken(self.upper, [*rest[train], *spare]), _taken(self.upper, rest[fold])


def _taken(rows: Any, numbers: Any) -> Any:
    """The rows ``numbers``, copied: to a selection a method adds no column without a bar."""
    if not isinstance(rows, Dataset):
        return [rows[int(k)] for k in numbers]
    return Dataset.from_dict(rows.with_format(None)[numbers], features=rows.features)
