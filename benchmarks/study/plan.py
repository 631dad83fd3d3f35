"""The runs that a study's YAML names, each a record whose fields say all that decides it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.store import Store

Options = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        part: ``variants``, ``rates``, ``table`` or ``shift``.
        task: of one domain, or source and target with an arrow.
        size: training rows; in ``shift`` those of the target.
        method: its name in tables.
        seed: of the rows, the adapter and the order of batches.
        rate: the peak learning rate.
        passes: batches that go forward and backward.
        options: what the method is.
        model: the adapter and the batches.
        rows: at most as many rows of the pool, of development and of test, and their tokens.
    """

    part: str
    task: str
    size: int
    method: str
    seed: int
    rate: float
    passes: int
    options: Options
    model: Options = field(repr=False)
    rows: dict[str, int] = field(repr=False)

    @property
    def number(self) -> int:
        """Another one if anything of the run changes."""
        content = json.dumps(asdict(self), sort_keys=True)
        return int(hashlib.sha256(content.encode()).hexdigest()[:16], 16)

    @property
    def key(self) -> str:
        """The key of the result in a store."""
        return f"{self.number:016x}"


@dataclass(frozen=True)
class Study:
    """The content of a YAML file.

    Raises:
        SystemExit: of `read`: the file has no such content.
    """

    model: Options
    rows: dict[str, int]
    tasks: dict[str, int]
    development: Options
    sizes: dict[int, int]
    seeds: list[int]
    rates: list[float]
    default: Options
    table: dict[str, Options]
    variants: Options
    shift: Options

    @classmethod
    def read(cls, path: Path) -> Study:
        """The study in a file."""
        try:
            study = cls(**yaml.safe_load(path.read_text()))
            cells = itertools.product(study.tasks, study.sizes, study.table)
            _ = [  # where an entry is missing, the plan cannot be made
                *study.variants_runs(),
                *study.shift_runs(),
                *itertools.starmap(study.rates_runs, cells),
            ]
        except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
            raise SystemExit(f"{path} is not a study: {error!r}") from error
        return study

    def method(self, options: Options) -> Options:
        """A method with what it leaves to the default."""
        if "method" in options:
            return {"phases": [{}], **options}
        bilevel = {**self.default["bilevel"], **options.get("bilevel", {})}
        if "preset" in bilevel:  # names its own estimator
            bilevel.pop("hypergradient")
        return {"passes": options.get("passes", self.default["passes"]), "bilevel": bilevel}

    def _run(self, part: str, task: str, size: int, unit: int, name: str, **more: Any) -> Run:
        options = {k: v for k, v in more.pop("options").items() if k != "rates"}
        passes = round(options.pop("passes") * unit)
        model = {**self.model, **more.pop("model", {})}
        length = more.pop("length") if "length" in more else self.tasks[task]
        rows = {**self.rows, "length": length}
        fields = {"passes": passes, "options": options, "model": model, "rows": rows}
        return Run(part, task, size, name, **fields, **more)

    def variants_runs(self) -> Iterator[Run]:
        """The default with one change, and controls, on development tasks and seeds."""
        plan = self.variants
        methods = {name: (self.method(each), {}) for name, each in plan["controls"].items()}
        for change in plan["changes"]:
            name = ", ".join(f"{key}={value}" for key, value in change.items()) or "default"
            model = {k: v for k, v in change.items() if k in self.model}
            bilevel = {k: v for k, v in change.items() if k not in self.model}
            methods[name] = (self.method({"bilevel": bilevel}), model)
        for seed in self.development["seeds"]:
            for task in self.development["tasks"]:
                for name, (options, model) in methods.items():
                    yield self._run(
                        *("variants", task, plan["size"], self.sizes[plan["size"]], name),
                        options=options,
                        model=model,
                        seed=seed,
                        rate=plan["rate"],
                    )

    def rates_of(self, name: str) -> list[float]:
        """The rates that a method of the table chooses from."""
        return self.table[name].get("rates", self.rates)

    def rates_runs(self, task: str, size: int, name: str) -> list[Run]:
        """The runs that choose the rate of a method."""
        unit, options = self.sizes[size], self.method(self.table[name])
        return [
            self._run(
                "rates", task, size, unit, name, options=options, seed=self.seeds[0], rate=rate
            )
            for rate in self.rates_of(name)
        ]

    def chosen(self, store: Store, task: str, size: int, name: str) -> float | None:
        """The rate of the lowest loss on held-out training rows, None before it is known."""
        results = [store.get(run.key) for run in self.rates_runs(task, size, name)]
        if any(result is None for result in results):
            return None
        losses = [result["loss"] for result in results if result is not None]
        return self.rates_of(name)[losses.index(min(losses))]

    def table_runs(self, store: Store) -> Iterator[Run]:
        """The runs of the table, those of larger sizes first, whose rates are known; those that
        choose a rate come where it is not."""
        for size in sorted(self.sizes, reverse=True):
            for seed in self.seeds:
                for task in self.tasks:
                    for name in self.table:
                        rate = self.chosen(store, task, size, name)
                        if rate is None:
                            yield from self.rates_runs(task, size, name)
                            rate = self.chosen(store, task, size, name)
                        if rate is not None:
                            yield self._run(
                                *("table", task, size, self.sizes[size], name),
                                options=self.method(self.table[name]),
                                seed=seed,
                                rate=rate,
                            )

    def shift_runs(self) -> Iterator[Run]:
        """The runs with a source domain and a target domain."""
        plan = self.shift
        for seed in self.seeds:
            for size in plan["targets"]:
                for source, target in plan["pairs"]:
                    for name, options in plan["methods"].items():
                        options = {**self.method(options), "source": plan["source"]}
                        yield self._run(
                            *("shift", f"{source} → {target}", size, plan["passes"], name),
                            options=options,
                            seed=seed,
                            rate=plan["rate"],
                            length=plan["length"],
                        )

    def runs(self, store: Store) -> Iterator[Run]:
        """All runs, in the order in which they are made; of the table those of known rates."""
        yield from self.variants_runs()
        yield from self.table_runs(store)
        yield from self.shift_runs()
