"""The runs of the study, each a record whose fields say all that decides it, in their order."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.store import Store

LORA, DORA, BIDORA = "LoRA", "DoRA", "BiDoRA"
PUBLISHED, FROZEN = "BiDoRA, published", "BiDoRA, upper rate 0"
#: DoRA, ended at the training loss that BiDoRA has on the same rows.
STOPPED = "DoRA, stopped at BiDoRA's training loss"
#: Arguments of `BilevelTrainer`, beside the rates; no method but these is bilevel.
BILEVEL: dict[str, dict[str, Any]] = {
    BIDORA: {},
    # Batches of one size at both levels and an upper step after each lower one, at its rate.
    PUBLISHED: {"preset": "published", "lower_steps": 1, "per_device_upper_batch_size": 8},
    FROZEN: {"upper_learning_rate": 0.0},
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task: its name.
        size: training rows.
        method: its name in tables.
        seed: of the rows, the adapter and the order of batches.
        rate: the peak learning rate.
        passes: batches that go forward and backward, of both phases and of upper steps.
        options: further arguments of `BilevelTrainer`; ``preset`` is `BiDoRA.published`.
        until: the training loss at which the run ends.
        model: the adapter and the batches.
        rows: at most as many rows, and their tokens.
    """

    task: str
    size: int
    method: str
    seed: int
    rate: float
    passes: int
    options: dict[str, Any]
    model: dict[str, int]
    rows: dict[str, int]
    until: float | None = None

    @property
    def key(self) -> str:
        """The key of the result in a store; another one if anything of the run changes."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Study:
    """What is run. Rates are chosen on the seeds ``development``, by rows held out from training.

    Attributes:
        tasks: their names.
        cells: training rows and passes, in the order of their runs.
        rates: of which each method has one in a cell, for all tasks.
        upper_rates: of which BiDoRA has one in a cell, for all tasks. The first is the one of the
            runs that choose the rate.
        seeds: of the runs that are judged by test rows.
        methods: those that are compared.
        check: training rows and passes of the check with all layers adapted.
    """

    tasks: tuple[str, ...] = ("trec", "sst2", "tweets", "tags")
    cells: tuple[tuple[int, int], ...] = (
        *((300, 300), (300, 100), (100, 100)),
        *((100, 300), (300, 900), (100, 900)),
    )
    rates: tuple[float, ...] = (4e-4, 1e-3, 2.5e-3, 6e-3, 1.5e-2)
    upper_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-1)
    development: tuple[int, ...] = (50, 51, 52)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = (LORA, DORA, BIDORA, PUBLISHED, FROZEN)
    check: tuple[int, int] = (300, 300)
    model: dict[str, int] = field(
        default_factory=lambda: {"layers": 1, "rank": 8, "alpha": 16, "batch_size": 8}
    )
    rows: dict[str, int] = field(
        default_factory=lambda: {"pool": 1200, "held_out": 200, "test": 600, "length": 16}
    )

    def run(self, cell: tuple[int, int], method: str, *, rate: float, **fields: Any) -> Run:
        """A run of a cell; ``upper_rate`` is an option of BiDoRA."""
        options = dict(BILEVEL.get(method, {}))
        if method == PUBLISHED:
            options["upper_learning_rate"] = rate
        if (upper_rate := fields.pop("upper_rate", None)) is not None:
            options["upper_learning_rate"] = upper_rate
        size, passes = cell
        return Run(
            size=size,
            passes=passes,
            method=method,
            rate=rate,
            **{"options": options, "model": self.model, "rows": self.rows, **fields},
        )

    def trials(self, cell: tuple[int, int], method: str, **fields: Any) -> list[Run]:
        """The runs that choose, of one rate and upper rate: each task and seed of development."""
        pairs = [(task, seed) for task in self.tasks for seed in self.development]
        return [self.run(cell, method, task=t, seed=seed, **fields) for t, seed in pairs]

    def candidates(self, store: Store, cell: tuple[int, int], method: str) -> list[dict[str, Any]]:
        """The rates of a method; of BiDoRA, once the best is known, upper rates with that one."""
        if method != BIDORA:
            return [{"rate": rate} for rate in self.rates]
        first = [{"rate": rate, "upper_rate": self.upper_rates[0]} for rate in self.rates]
        best = self.best(store, cell, method, first)
        return first + [{**best, "upper_rate": rate} for rate in self.upper_rates[1:] if best]

    def score(self, store: Store, runs: list[Run]) -> float | None:
        """The mean score on held-out rows, None before all runs have one."""
        results = [store.get(run.key) for run in runs]
        scores = [result["held_out"]["score"] for result in results if result is not None]
        return statistics.fmean(scores) if len(scores) == len(runs) else None

    def best(
        self, store: Store, cell: tuple[int, int], method: str, candidates: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The candidate of the highest mean score, empty before all are known; ties: the first."""
        scores = [self.score(store, self.trials(cell, method, **each)) for each in candidates]
        known = [score for score in scores if score is not None]
        return candidates[scores.index(max(known))] if len(known) == len(scores) else {}

    def chosen(self, store: Store, cell: tuple[int, int], method: str) -> dict[str, Any]:
        """The rates of a method in a cell, empty before they are known."""
        if method == STOPPED:
            return self.chosen(store, cell, DORA)
        if method == FROZEN:  # a control: the same run but for the upper rate
            return {k: v for k, v in self.chosen(store, cell, BIDORA).items() if k == "rate"}
        candidates = self.candidates(store, cell, method)
        return self.best(store, cell, method, candidates)

    def choice(self, store: Store, cell: tuple[int, int]) -> Iterator[Run]:
        """The runs that choose the rates of a cell."""
        for method in (each for each in self.methods if each != FROZEN):
            for _ in range(2):  # BiDoRA's upper rates are known after the others
                for candidate in self.candidates(store, cell, method):
                    yield from self.trials(cell, method, **candidate)

    def judged(self, store: Store, cell: tuple[int, int]) -> Iterator[Run]:
        """The runs of a cell that test rows judge, of the methods whose rates are known."""
        rates = {each: self.chosen(store, cell, each) for each in (*self.methods, STOPPED)}
        for seed in self.seeds:
            for task in self.tasks:
                where = {"task": task, "seed": seed}
                for method in (each for each in self.methods if rates[each]):
                    run = self.run(cell, method, **where, **rates[method])
                    yield run
                    result = store.get(run.key)
                    if method == BIDORA and result and rates[STOPPED]:
                        until = {"until": result["train"]["loss"]}
                        yield self.run(cell, STOPPED, **where, **rates[STOPPED], **until)

    def checks(self, store: Store) -> Iterator[Run]:
        """All layers adapted, one seed: at the rate of the cell, and at the next lower one."""
        model = {**self.model, "layers": 6}
        for method in self.methods:
            if rates := self.chosen(store, self.check, method):
                for task in self.tasks:
                    place = self.rates.index(rates["rate"])
                    for rate in self.rates[max(0, place - 1) : place + 1]:
                        where = {"task": task, "seed": self.seeds[0], "model": model}
                        yield self.run(self.check, method, **where, **{**rates, "rate": rate})

    def runs(self, store: Store) -> Iterator[Run]:
        """All runs, in their order. Read on after each has its result: it decides later ones."""
        for cell in self.cells:
            yield from self.choice(store, cell)
            yield from self.judged(store, cell)
        yield from self.checks(store)


def quick() -> Study:
    """A study of a minute."""
    study = Study(
        tasks=("tweets", "tags"),
        cells=((40, 12),),
        rates=(2.5e-3, 6e-3),
        upper_rates=(1e-2, 1e-1),
        development=(50,),
        seeds=(0, 1),
        check=(40, 12),
    )
    return replace(study, rows={"pool": 80, "held_out": 40, "test": 40, "length": 16})
