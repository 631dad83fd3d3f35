"""Which rows train a run, and which score it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, concatenate_datasets

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import require_examples
from hyperopt_peft.trainer.splits import firsts, folds_of, hold_out, shared_rows, split_dataset


@dataclass(frozen=True)
class Rows:
    """The rows of a comparison, and their division for each run.

    Attributes:
        train, upper, test, folds, held_out: as in `compare_methods`.
        spare: whether folds leave a further part out, which scores the development runs alone.
        reads: the columns in which equal rows are equal, as in `split_dataset`.
        parts: the seeds, each of which draws its training rows and scores a part of ``test`` of its
            own; given where the training is not random, so that all seeds would have one score.
    """

    train: Any
    upper: Any = None
    test: Any = None
    folds: int | None = None
    held_out: float = 0.2
    spare: bool = True
    parts: Sequence[int] = ()
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
        if self.spare and self.upper is not None and len(self.upper) < 2:
            raise ProblemError(
                "upper_dataset: one trusted row cannot both train and choose a rate; give more"
            )
        if self.folds is None:
            count, rest = len(self.test), {*range(len(self.test))}
            for rows in (self.train, self.upper):
                rest -= {*shared_rows(self.test, rows, self.reads)}
            if not rest:
                raise ProblemError("test_dataset: all of its rows are training rows; give others")
            if len(rest) < len(self.parts):
                raise ProblemError(
                    f"test_dataset: {len(rest)} rows for {len(self.parts)} seeds, each of which "
                    "scores some of its own; give more rows or fewer seeds"
                )
            if len(rest) == count:
                return self, ""
            note = f"{count - len(rest)} of {count} test rows are training rows too, and left out"
            return replace(self, test=self.test.select(sorted(rest))), note
        require_examples("upper_dataset", self.upper)
        most, again = len(self.upper) - self.spare, shared_rows(self.upper, self.train, self.reads)
        if not 2 <= self.folds <= most:
            raise ProblemError(
                f"folds: {self.folds} of {len(self.upper)} trusted rows; give 2 to {most}"
            )
        if again:
            raise ProblemError(
                f"upper_dataset: row {min(again)} (from 0) is in train_dataset too, so that a run "
                "trains on what scores it; remove it"
            )
        return self, ""

    def of(self, seed: int, development: bool) -> tuple[Any, Any, Any]:
        """The rows (lower level, trusted, scoring) of a run.

        Example:
            >>> trusted = Dataset.from_dict({"x": range(6)})
            >>> rows = Rows(Dataset.from_dict({"x": [9]}), trusted, folds=3, spare=False)
            >>> sorted(x for seed in range(3, 6) for x in rows.of(seed, False)[2]["x"])
            [0, 1, 2, 3, 4, 5]
        """
        if self.folds is not None:
            return self.train, *self._fold(seed, development, self.folds)
        if self.parts:
            part = self.test.shard(len(self.parts), self.parts.index(seed), contiguous=False)
            options = {"seed": seed, "argument": "held_out", "reads": self.reads}
            draw = lambda x: x and x.select(hold_out(x, self.held_out, **options)[0])  # noqa: E731
            return draw(self.train), draw(self.upper), part
        if not development:
            return self.train, self.upper, self.test
        rows = self.train if self.upper is None else self.upper
        try:
            rest, scored = split_dataset(rows, self.held_out, seed, reads=self.reads)
        except ProblemError:  # of a class that is too rare to be in both parts
            parts = hold_out(rows, self.held_out, seed, "held_out", reads=self.reads)
            rest, scored = map(rows.select, parts)
        return (rest, None, scored) if self.upper is None else (self.train, rest, scored)

    def _fold(self, seed: int, development: bool, folds: int) -> tuple[Any, Any]:
        rest, others = self.upper, self.upper.select([])
        if self.spare:
            rest, others = _apart(rest, folds_of(firsts(rest, self.reads), folds + 1)[0])
        if development:
            return rest, others
        parts = folds_of(firsts(rest, self.reads), folds, seed // folds)
        train, fold = _apart(rest, parts[seed % folds])
        return concatenate_datasets([train, others]), fold


def _apart(rows: Dataset, fold: Sequence[int]) -> tuple[Dataset, Dataset]:
    return rows.select(sorted({*range(len(rows))} - {*fold})), rows.select(fold)
