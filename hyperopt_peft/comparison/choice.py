"""What is chosen in a comparison: each seed's rates and stopping point, on its held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from statistics import fmean
from typing import Literal

from hyperopt_peft.comparison.fit import peak
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Kind, Run
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.method import Method, has_upper_level

#: Five rates over two decades.
RATES = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
UPPER_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: What a seed chooses, in this order.
Axis = Literal["rate", "upper_rate"]
AXES: tuple[Axis, ...] = "rate", "upper_rate"


@dataclass(frozen=True)
class Choice:
    """How `compare_methods` chooses rates and stopping points.

    Each seed chooses its own, by the mean score of ``splits`` random parts of its rows, each held
    out from a training with the other rows. A quadratic fit over the logarithm of the rate narrows
    the choice (`comparison.fit.peak`).

    Args:
        rates, upper_rates: the grids; one value is no choice and costs no run.
        splits: the held-out parts for each seed and rate.
        held_out: the share of the trusted rows in such a part; without trusted rows, of the
            training rows.
        points: at how many equally spaced points of its budget a run may stop, in the last of its
            phases; 1 is its end alone. A second training stops after as many passes of its own as
            the one that was scored.

    Raises:
        ProblemError: an empty grid, or a rate that is not positive; no splits or points; a share
            outside (0, 1).

    Example:
        >>> Choice(rates=[1e-3, 1e-2], points=8).splits
        2
    """

    rates: Sequence[float] = RATES
    upper_rates: Sequence[float] = UPPER_RATES
    splits: int = 2
    held_out: float = 0.2
    points: int = 1

    def __post_init__(self) -> None:
        """Refuse what no run can have."""
        for name in ("rates", "upper_rates"):
            grid = tuple(dict.fromkeys(map(float, getattr(self, name))))
            if not grid or not all(0 < rate < float("inf") for rate in grid):
                raise ProblemError(f"{name}: must be positive numbers, got {[*grid]}")
            object.__setattr__(self, name, grid)
        for name in ("splits", "points"):
            if getattr(self, name) < 1:
                raise ProblemError(f"{name}: must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ProblemError(f"held_out: must be a share in (0, 1), got {self.held_out}")


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison at one budget; most attributes are arguments of `compare_methods`.

    Attributes:
        passes: the budget of each run; 0 of heads, which are solved.
    """

    methods: Mapping[str, Method]
    choice: Choice
    seeds: Sequence[int]
    metric: str
    lower_is_better: bool
    passes: float = 0.0
    ablations: Mapping[str, Sequence[Kind]] | None = None

    def candidates(self) -> list[tuple[str, Kind]]:
        """The methods, each followed by its ablations.

        A method whose search is followed by a training from scratch has no form with one level, nor
        one whose lower loss alone drives its variables to an end.
        """
        pairs: list[tuple[str, Kind]] = []
        for name, method in self.methods.items():
            pairs.append((name, "method"))
            kinds: Sequence[Kind] = "frozen", "one level"
            if self.ablations is not None:
                kinds = self.ablations.get(name, ())
            for kind in kinds if has_upper_level(method) else ():
                alone = method.one_level and method.defaults.get("retrain") != "scratch"
                if kind == "frozen" or alone:
                    pairs.append((name, kind))
        return pairs

    def stages(self, store: Store) -> Iterator[list[Run]]:
        """Runs that choose the rates, those that choose upper rates at them, and reported ones.

        A stage reads the scores of the stage before it. The upper rate is first the middle of its
        grid. The form with a frozen upper level has the rates of the method.
        """
        every = [(*each, seed) for each in self.candidates() for seed in self.seeds]
        yield self._development(self._grid(self._first(*each), "rate") for each in every)
        yield self._development(
            self._grid(self._best(store, self._first(*each), "rate", stopped), "upper_rate")
            for each in every
            for stopped in self.endings
        )
        stopped = every if len(self.endings) > 1 else []  # at rates that were given, or frozen
        yield self._development([self._rated(store, *each, True)] for each in stopped)
        chosen = [self.chosen(store, *each, end) for end in self.endings for each in every]
        yield [*dict.fromkeys(chosen)]

    @property
    def endings(self) -> Sequence[bool]:
        """Whether reported runs stop at their best points: none, or a second one of each."""
        return (False, True) if self.choice.points > 1 else (False,)

    def count(self, name: str, kind: Kind) -> int:
        """The number of runs of a method or an ablation; those that stop early are counted once."""
        first = self._first(name, kind, self.seeds[0])
        grids = [len(self._grid(first, axis)) for axis in ("rate", "upper_rate")]
        tried = sum(grids) - (min(grids) > 0) or len(self.endings) - 1  # the middle one is in both
        return len(self.seeds) * (self.choice.splits * tried + len(self.endings))

    def chosen(self, store: Store, name: str, kind: Kind, seed: int, stopped: bool = False) -> Run:
        """The reported run of a seed; with ``stopped`` the one that ends at its best point.

        Raises:
            ProblemError: no rate has a finite score.
        """
        stopped = stopped and self.choice.points > 1
        run = self._rated(store, name, kind, seed, stopped)
        if not stopped:
            return run
        sign = -1 if self.lower_is_better else 1
        points = [each for each in self.curve(store, run) if isfinite(each[1])]
        stop = max(points, key=lambda each: sign * each[1], default=(self.passes, nan))[0]
        if stop == self.passes:
            return run
        return replace(run, stop=stop - self._searched(store, run))

    def _searched(self, store: Store, run: Run) -> float:
        """The mean passes before the second training of development runs; 0 without one.

        Held-out rows leave smaller upper batches, so that it begins earlier than in a reported run.
        """
        every = [store.results[each]["spent"] for each in self.development(run)]
        searched = (x["lower steps"] + x["upper steps"] for x in every if x.get("second training"))
        return fmean([*searched] or [0.0])

    def curve(self, store: Store, run: Run) -> list[tuple[float, float]]:
        """The passes at each point of ``run``, and the mean score on its seed's held-out parts.

        The score is NaN where a development run has none.
        """
        name = f"eval_{self.metric}"
        curves = [dict(store.results[each]["curve"]) for each in self.development(run)]
        return [
            (point, fmean(curve.get(point, {}).get(name, nan) for curve in curves))
            for point in self.points
        ]

    def development(self, run: Run) -> list[Run]:
        """The runs that score ``run``, one for each held-out part of its seed."""
        run = replace(run, points=self.points)
        return [replace(run, split=split) for split in range(self.choice.splits)]

    @property
    def points(self) -> tuple[float, ...]:
        """The passes after which a run may stop, its end included."""
        count = self.choice.points
        return tuple(self.passes * (k / count) for k in range(1, count + 1))

    def at_every_rate(
        self, store: Store, name: str, kind: Kind
    ) -> Iterator[tuple[Axis, float, float]]:
        """Each rate and upper rate of a grid with a choice, and the seeds' mean held-out score.

        Upper rates are those at each seed's own rate.
        """
        runs = [self._first(name, kind, seed) for seed in self.seeds]
        for axis in AXES:
            for each in zip(*(self._grid(run, axis) for run in runs)):
                mean = fmean(self.curve(store, run)[-1][1] for run in each)
                yield axis, getattr(each[0], axis), mean
            runs = [self._best(store, run, axis, False) for run in runs]

    def _first(self, name: str, kind: Kind, seed: int) -> Run:
        """A run at the middle of both grids."""
        upper = None
        if kind == "method" and has_upper_level(self.methods[name]):
            upper = self.choice.upper_rates[len(self.choice.upper_rates) // 2]
        rate = self.choice.rates[len(self.choice.rates) // 2]
        return Run(name, kind, seed, rate, upper, passes=self.passes)

    def _grid(self, run: Run, axis: Axis) -> list[Run]:
        """``run`` at all rates of a grid that leaves a choice."""
        grid = self.choice.rates if axis == "rate" else self.choice.upper_rates
        if len(grid) == 1 or getattr(run, axis) is None or run.kind == "frozen":
            return []
        return [_with(run, axis, rate) for rate in grid]

    def _best(self, store: Store, run: Run, axis: Axis, stopped: bool) -> Run:
        """``run`` at the best rate of a grid, on its seed's held-out rows."""
        if not (runs := self._grid(run, axis)):
            return run
        sign = -1 if self.lower_is_better else 1
        scores: list[float] = []
        for each in runs:
            values = [sign * score for _, score in self.curve(store, each)]
            scores.append(max(filter(isfinite, values), default=nan) if stopped else values[-1])
        if not any(map(isfinite, scores)):
            raise ProblemError(
                f"{run.method}: no rate has a finite score; give lower rates or another metric"
            )
        return _with(run, axis, peak([getattr(each, axis) for each in runs], scores))

    def _rated(self, store: Store, name: str, kind: Kind, seed: int, stopped: bool) -> Run:
        """The run of a seed at its rates."""
        run = self._first(name, "method" if kind == "frozen" else kind, seed)
        for axis in AXES:
            run = self._best(store, run, axis, stopped)
        return replace(run, kind=kind, upper_rate=None) if kind == "frozen" else run

    def _development(self, grids: Iterable[Sequence[Run]]) -> list[Run]:
        """The development runs of all runs in ``grids``, each once."""
        every = (each for grid in grids for run in grid for each in self.development(run))
        return [*dict.fromkeys(every)]


def _with(run: Run, axis: Axis, rate: float) -> Run:
    return replace(run, rate=rate) if axis == "rate" else replace(run, upper_rate=rate)
