"""Which rows train a run, and which score it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import require_examples
from hyperopt_peft.trainer.splits import firsts, folds_of, hold_out, shared_rows, split_dataset


@dataclass(frozen=True)
class Rows:
    """The rows of a comparison, and their division for each run.

    Attributes:
        train, upper, test, folds, held_out: as in `compare_methods`.
        reads: the columns in which equal rows are equal, as in `split_dataset`.
        draws: the seeds, each of which draws its training rows and scores a part of ``test`` of its
            own; given where the training is not random, so that all seeds would have one score.
    """

    train: Any
    upper: Any = None
    test: Any = None
    folds: int | None = None
    held_out: float = 0.2
    draws: Sequence[int] = ()
    reads: Any = None

    def usable(self) -> tuple[Rows, str]:
        """These without test rows that are training rows too, and a sentence with their number.

        Raises:
            ProblemError: no test rows or folds, or both; fewer trusted rows than folds; a trusted
                row in the training rows; all test rows are training rows.
        """
        if (self.test is None) == (self.folds is None):
            raise ProblemError("test_dataset: give either test_dataset or folds")
        others = {"upper_dataset": self.upper, "test_dataset": self.test}
        for name, rows in {"train_dataset": self.train, **others}.items():
            if rows is None and name in others:
                continue
            require_examples(name, rows)
            if not isinstance(rows, Dataset):
                kind = type(rows).__name__
                raise ProblemError(f"{name}: must be a datasets.Dataset, got a {kind}")
        if self.upper is not None and len(self.upper) < 2:
            raise ProblemError(
                "upper_dataset: one trusted row cannot both train and choose a rate; give more"
            )
        if self.folds is None:
            count = len(self.test)
            rest = {*range(count)}
            for rows in (self.train, self.upper):
                rest -= {*shared_rows(self.test, rows, self.reads)}
            if not rest:
                raise ProblemError("test_dataset: all of its rows are training rows; give others")
            if len(rest) < len(self.draws):
                raise ProblemError(
                    f"test_dataset: {len(rest)} rows for {len(self.draws)} seeds, each of which "
                    "scores some of its own; give more rows or fewer seeds"
                )
            if len(rest) == count:
                return self, ""
            note = f"{count - len(rest)} of {count} test rows are training rows too, and left out"
            return replace(self, test=self.test.select(sorted(rest))), note
        require_examples("upper_dataset", self.upper)
        most = len(self.upper)
        if not 2 <= self.folds <= most:
            raise ProblemError(f"folds: {self.folds} of {most} trusted rows; give 2 to {most}")
        if again := shared_rows(self.upper, self.train, self.reads):
            raise ProblemError(
                f"upper_dataset: row {min(again)} (from 0) is in train_dataset too, so that a run "
                "trains on what scores it; remove it"
            )
        return self, ""

    def of(self, seed: int, split: int | None = None) -> tuple[Any, Any, Any]:
        """The rows (lower level, trusted, scoring) of a run.

        Example:
            >>> trusted = Dataset.from_dict({"x": range(6)})
            >>> rows = Rows(Dataset.from_dict({"x": [9]}), trusted, folds=3)
            >>> sorted(x for seed in range(3, 6) for x in rows.of(seed)[2]["x"])
            [0, 1, 2, 3, 4, 5]
        """
        train, upper, test = self.train, self.upper, self.test
        if self.folds is not None:
            every = folds_of(firsts(upper, self.reads), self.folds, seed // self.folds)
            chosen = {*every[seed % self.folds]}
            test = upper.select(sorted(chosen))
            upper = upper.select(sorted({*range(len(upper))} - chosen))
        elif self.draws:
            test = test.shard(len(self.draws), self.draws.index(seed), contiguous=False)
            options = {"seed": seed, "argument": "held_out", "reads": self.reads}
            draw = lambda x: x and x.select(hold_out(x, self.held_out, **options)[0])  # noqa: E731
            return draw(train), draw(upper), test
        if split is None:
            return train, upper, test
        rows = train if upper is None else upper
        number = seed + 100_003 * split
        try:
            rest, scored = split_dataset(rows, self.held_out, number, reads=self.reads)
        except ProblemError:  # of a class that is too rare to be in both parts
            numbers = hold_out(rows, self.held_out, number, "held_out", reads=self.reads)
            rest, scored = map(rows.select, numbers)
        return (rest, None, scored) if upper is None else (train, rest, scored)
