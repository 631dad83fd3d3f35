"""The runs of a comparison: the runs that choose the rates, then the reported runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from statistics import fmean
from typing import Any

from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Kind, Run
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.method import Method, has_upper_level

#: Five rates over two decades.
RATES = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
UPPER_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison; attributes are arguments of `compare_methods`."""

    methods: Mapping[str, Method]
    rates: Sequence[float]
    upper_rates: Sequence[float]
    development: Sequence[int]
    seeds: Sequence[int]
    lower_is_better: bool
    ablations: Collection[str] | None = None

    def candidates(self) -> list[tuple[str, Kind]]:
        """The methods, each followed by its ablations.

        A method whose search is followed by a training from scratch has no form with one level, nor
        one whose lower loss alone drives its variables to an end.
        """
        pairs: list[tuple[str, Kind]] = []
        for name, method in self.methods.items():
            pairs.append((name, "method"))
            if has_upper_level(method) and (self.ablations is None or name in self.ablations):
                pairs.append((name, "frozen"))
                if method.one_level and method.defaults.get("retrain") != "scratch":
                    pairs.append((name, "one level"))
        return pairs

    def count(self, name: str, kind: Kind) -> int:
        """The number of runs of a method or an ablation."""
        grid = len(self._grid(name, kind)) if len(self.rates) > 1 else 0
        if kind == "method" and has_upper_level(self.methods[name]) and len(self.upper_rates) > 1:
            grid += (len(self.upper_rates) - (len(self.rates) > 1)) * len(self.development)
        return grid + len(self.seeds)

    def stages(self, store: Store) -> Iterator[list[Run]]:
        """Runs that choose each rate, those that choose each upper rate at it, and reported ones.

        A stage reads the scores of the stage before it. The upper rate is first the middle of its
        grid. The form with a frozen upper level has the rate of the method. A grid of one has no
        runs.
        """
        several = len(self.rates) > 1
        yield [run for each in self.candidates() for run in self._grid(*each) if several]
        names = [name for name, method in self.methods.items() if has_upper_level(method)]
        grids = (self._grid(name, "method") for name in names if len(self.upper_rates) > 1)
        yield [run for grid in grids for run in self._upper_grid(self._best(grid, store))]
        yield [run for each in self.candidates() for run in self.runs_of(store, *each)]

    def _grid(self, name: str, kind: Kind) -> list[Run]:
        if kind == "frozen":
            return []
        upper = None
        if kind == "method" and has_upper_level(self.methods[name]):
            upper = self.upper_rates[len(self.upper_rates) // 2]
        return [
            Run(name, kind, seed, rate, upper, development=True)
            for rate in self.rates
            for seed in self.development
        ]

    def _upper_grid(self, best: Run) -> list[Run]:
        return [
            replace(best, upper_rate=rate, seed=seed)
            for rate in self.upper_rates
            for seed in self.development
        ]

    def chosen(self, store: Store, name: str, kind: Kind) -> Run:
        """The rates of a method or an ablation, in a run."""
        if kind == "frozen":
            return replace(self.chosen(store, name, "method"), kind=kind, upper_rate=None)
        best = self._best(self._grid(name, kind), store)
        if best.upper_rate is None:
            return best
        return self._best(self._upper_grid(best), store)

    def runs_of(self, store: Store, name: str, kind: Kind) -> list[Run]:
        """The reported runs of a method or an ablation, one for each seed."""
        best = replace(self.chosen(store, name, kind), development=False)
        return [replace(best, seed=seed) for seed in self.seeds]

    def _best(self, runs: Sequence[Run], store: Store) -> Run:
        """The first run at the rates of the best finite mean score.

        With one pair of rates no score is needed.

        Raises:
            ProblemError: no score is finite.
        """
        if len({(run.rate, run.upper_rate) for run in runs}) == 1:
            return runs[0]
        means = [each for each in self.means(runs, store) if isfinite(each[1])]
        if not means:
            raise ProblemError(
                f"{runs[0].method}: no rate has a finite score; give lower rates or another metric"
            )
        sign = -1 if self.lower_is_better else 1
        return max(means, key=lambda each: sign * each[1])[0]

    def means(self, runs: Sequence[Run], store: Store) -> Iterator[tuple[Run, float]]:
        """The first run of each pair of rates, and the mean score over seeds."""
        groups: dict[Any, list[Run]] = {}
        for run in runs:
            groups.setdefault((run.rate, run.upper_rate), []).append(run)
        for group in groups.values():
            yield group[0], fmean(store.scores(group))

    def at_every_rate(self, store: Store, name: str, kind: Kind) -> list[tuple[Run, float]]:
        """The mean score at each rate that was tried."""
        grid = self._grid(name, kind)
        if grid and grid[0].upper_rate is not None:
            grid = [*grid, *self._upper_grid(self._best(grid, store))]
        tried = [run for run in dict.fromkeys(grid) if run in store.results]
        return list(self.means(tried, store))
