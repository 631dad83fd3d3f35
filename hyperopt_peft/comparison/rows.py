"""Which rows train a run, and which score it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, concatenate_datasets

from hyperopt_peft.comparison.influence import mixed
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import require_examples
from hyperopt_peft.trainer.splits import firsts, folds_of, hold_out, shared_rows, split_dataset


@dataclass(frozen=True)
class Drawn:
    """Rows of which each seed has its own.

    Attributes:
        rows: those of all seeds.
        chosen: by seed, the places of its rows among them.

    Example:
        >>> drawn = Drawn.by("rows", lambda seed: Dataset.from_dict({"x": [seed, 9]}), [3, 4])
        >>> drawn.of(4)["x"][:], drawn.rows["x"][:]
        ([4, 9], [3, 9, 4, 9])
    """

    rows: Dataset
    chosen: Mapping[int, Sequence[int]]

    @classmethod
    def by(cls, name: str, function: Callable[[int], Any], seeds: Iterable[int]) -> Drawn:
        """The rows that ``function`` gives for each of ``seeds``.

        Raises:
            ProblemError: it gives none, or no Dataset, or Datasets of different columns.
        """
        every = {seed: _table(f"{name}({seed})", function(seed)) for seed in seeds}
        (first, begin), *others = ((seed, rows.features) for seed, rows in every.items())
        for seed, features in others:
            if features != begin:
                raise ProblemError(
                    f"{name}: the columns of seed {seed}, {features}, are not those of {first}, "
                    f"{begin}; give all seeds the same"
                )
        rows = concatenate_datasets([*every.values()])
        end, chosen = 0, {}
        for seed, table in every.items():
            chosen[seed] = range(end, end := end + len(table))
        return cls(rows, chosen)

    def of(self, seed: int) -> Dataset:
        """The rows of ``seed``."""
        return self.rows.select(self.chosen[seed])

    def without(self, seed: int, left_out: Iterable[int]) -> Sequence[int]:
        """The places of the rows of ``seed`` but those whose number among these is left out."""
        gone = {*left_out}
        return [place for number, place in enumerate(self.chosen[seed]) if number not in gone]


#: Rows as a user gives them: a Dataset, or a function of the seed.
Source = Dataset | Callable[[int], Dataset] | None
#: A Dataset that all seeds share, or what each has of its own, a `Drawn`; or None.
Table = Any


@dataclass(frozen=True)
class Rows:
    """The rows of a comparison, and their division for each run.

    Attributes:
        train, upper, test: of all seeds, or of each one.
        held_out: the share of the rows of a seed by which it chooses.
        reads: the columns in which equal rows are equal, as in `split_dataset`.
        folds: how many parts of the trusted rows score, if these do.
    """

    train: Table
    upper: Table = None
    test: Table = None
    held_out: float = 0.2
    reads: Any = None
    folds: int | None = None

    @classmethod
    def made(
        cls,
        tables: Mapping[str, Any],
        seeds: Sequence[int],
        folds: int | None = None,
        solved: bool = False,
        **options: Any,
    ) -> tuple[Rows, str]:
        """Those of arguments of `compare_methods`, and a sentence on test rows that are left out.

        Args:
            tables: by the name of the argument, a Dataset, a function of the seed or None.
            seeds, folds: as in `compare_methods`.
            solved: where a training is not random, each seed has a random share 1 − ``held_out`` of
                the training rows and of the trusted ones, since all would have one score.
            options: ``held_out`` and ``reads``.

        Raises:
            ProblemError: no test rows or folds, or both; fewer trusted rows than folds; a trusted
                row in the training rows; all test rows are training rows.
        """
        every: dict[str, Any] = {}
        for name, rows in tables.items():
            every[name] = None
            if rows is not None or name == "train_dataset":
                every[name] = Drawn.by(name, rows, seeds) if callable(rows) else _table(name, rows)
        train, upper, test = every.values()
        if (test is None) == (folds is None):
            raise ProblemError("test_dataset: give either test_dataset or folds")
        if upper is not None and min(map(len, _each(upper))) < 2:
            raise ProblemError(
                "upper_dataset: one trusted row cannot both train and choose a rate; give more"
            )
        rows = cls(train, upper, test, folds=folds, **options)
        if folds is not None:
            return rows._divided(seeds), ""
        apart, note = rows._apart()
        if solved and not any(isinstance(x, Drawn) for x in (train, upper)):
            apart = replace(
                apart, train=apart._share(train, seeds), upper=apart._share(upper, seeds)
            )
        return apart, note

    def _apart(self) -> tuple[Rows, str]:
        """These without test rows that are training rows too."""
        test = self.test
        if isinstance(test, Drawn):
            left = {}
            for seed in test.chosen:
                train, upper, mine = self.of(seed)
                again = (shared_rows(mine, rows, self.reads) for rows in (train, upper))
                left[seed] = test.without(seed, {row for rows in again for row in rows})
            count, rest = (sum(map(len, x.values())) for x in (test.chosen, left))
            fewest, rows = min(map(len, left.values())), replace(test, chosen=left)
        else:
            every = (all_of(rows) for rows in (self.train, self.upper))
            trained = {row for rows in every for row in shared_rows(test, rows, self.reads)}
            count, rest = len(test), len(test) - len(trained)
            fewest, rows = rest, mixed(test.select(sorted({*range(count)} - trained)))
        if not fewest:
            raise ProblemError("test_dataset: all of its rows are training rows; give others")
        note = f"{count - rest} of {count} test rows are training rows too, and left out"
        return replace(self, test=rows), note if rest < count else ""

    def _divided(self, seeds: Sequence[int]) -> Rows:
        """These, with a fold of the trusted rows to score each seed, and the others to train it."""
        upper, folds = self.upper, self.folds or 0
        require_examples("upper_dataset", all_of(upper))
        if isinstance(upper, Drawn):
            raise ProblemError(
                "upper_dataset: folds divide rows that all seeds share; give a datasets.Dataset"
            )
        if not 2 <= folds <= len(upper):
            most = len(upper)
            raise ProblemError(f"folds: {folds} of {most} trusted rows; give 2 to {most}")
        if again := shared_rows(upper, all_of(self.train), self.reads):
            raise ProblemError(
                f"upper_dataset: row {min(again)} (from 0) is in train_dataset too, so that a run "
                "trains on what scores it; remove it"
            )
        groups, scored, rest = firsts(upper, self.reads), {}, {}
        for seed in seeds:
            scored[seed] = folds_of(groups, folds, seed // folds)[seed % folds]
            rest[seed] = sorted({*range(len(upper))} - {*scored[seed]})
        return replace(self, upper=Drawn(upper, rest), test=Drawn(upper, scored))

    def _share(self, rows: Any, seeds: Sequence[int]) -> Table:
        """A random share of ``rows`` for each of ``seeds``."""
        if rows is None:
            return None
        options: Any = {"argument": "held_out", "reads": self.reads}
        return Drawn(rows, {x: hold_out(rows, self.held_out, x, **options)[0] for x in seeds})

    def tables(self) -> dict[str, Table]:
        """The rows by their use."""
        return {"train": self.train, "upper": self.upper, "test": self.test}

    @property
    def scoring(self) -> int:
        """The number of test rows: those that all seeds share, of all folds, or of a seed."""
        if self.folds is not None or not isinstance(self.test, Drawn):
            return len(all_of(self.test))
        return min(map(len, self.test.chosen.values()))

    def of(self, seed: int, split: int | None = None) -> tuple[Any, Any, Any]:
        """The rows (lower level, trusted, scoring) of a run.

        Example:
            >>> train, trusted = (Dataset.from_dict({"x": x}) for x in ([9], range(6)))
            >>> tables = {"train_dataset": train, "upper_dataset": trusted, "test_dataset": None}
            >>> rows, _ = Rows.made(tables, range(3, 6), folds=3)
            >>> sorted(x for seed in range(3, 6) for x in rows.of(seed)[2]["x"])
            [0, 1, 2, 3, 4, 5]
        """
        every = self.tables().values()
        train, upper, test = (x.of(seed) if isinstance(x, Drawn) else x for x in every)
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


def _table(name: str, rows: Any) -> Any:
    """``rows``, an argument of this name.

    Raises:
        ProblemError: it is no Dataset, or has no rows.
    """
    require_examples(name, rows)
    if not isinstance(rows, Dataset):
        raise ProblemError(f"{name}: must be a datasets.Dataset, got a {type(rows).__name__}")
    return rows


def all_of(rows: Table) -> Any:
    """The rows of all seeds."""
    return rows.rows if isinstance(rows, Drawn) else rows


def with_rows(table: Table, rows: Any) -> Any:
    """``rows`` in place of those of all seeds."""
    return replace(table, rows=rows) if isinstance(table, Drawn) else rows


def _each(rows: Any) -> list[Any]:
    """The rows, or the places, of each seed."""
    return [*rows.chosen.values()] if isinstance(rows, Drawn) else [rows]
