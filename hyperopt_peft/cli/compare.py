"""hyperopt-peft compare: methods with the same data, budget and start, for several seeds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from tempfile import mkdtemp
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.options import OutputArguments, divided, names_of
from hyperopt_peft.cli.plan import seconds_a_pass, whole
from hyperopt_peft.cli.plan import table as table_of
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.cli.text.setup import SHARED, Chosen, Setup, changed, choose, prepare
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.find import find_method
from hyperopt_peft.trainer.logs import TIMINGS
from hyperopt_peft.trainer.method import has_upper_level
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.tables import aligned

METHODS = ["lora", "dora", "bidora"]


@dataclass
class CompareArguments(OutputArguments):
    """The methods and the seeds."""

    methods: list[str] = HfArg(
        default_factory=lambda: list(METHODS),
        help="as the option method of train; or with an estimator: bidora:cg:steps=5,damping=1.0",
    )
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2],
        help="of the start, the split and the order of examples; each method runs once a seed",
    )

    def __post_init__(self) -> None:
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ProblemError(f"seeds must be in [0, 2³²), got {wrong[0]}")


TYPES = (CompareArguments, *SHARED)


@dataclass(frozen=True)
class MethodRun:
    """One method with one seed."""

    method: str
    seed: int
    metrics: dict[str, float]
    seconds: float
    passes: int


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train every method with every seed, write the table and the runs."""
    chosen = choose_all(argv)
    first = next(iter(chosen.values()))
    command, output = first.command, Path(first.args.output_dir)
    command.require_output(first.args)
    methods = [each.method for each in chosen.values()]
    setup = prepare(first.model, first.data, first.args, *methods)
    if setup.evaluation is None:
        raise ProblemError("eval_fraction: compare needs evaluation examples; give eval_file")
    budget = first.args.steps_of(len(setup.train) + len(setup.upper or ()))
    for each in chosen.values():
        again = {**(each.args.retrain_arguments or {}), "max_steps": budget}
        each.args = changed(each.args, max_steps=budget, retrain_arguments=again)
        each.args.output_dir = first.args.output_dir  # of a dry run another one
    if not distributed.rank():
        print(f"{budget} steps each; a method with two phases has as many in each", flush=True)
    seeds, runs, metric = list(dict.fromkeys(command.seeds)), list[MethodRun](), setup.task.metric
    if command.dry_run:
        trainers = {name: setup.trainer(x.args, x.method) for name, x in chosen.items()}
        works = [whole(trainer, name, len(seeds)) for name, trainer in trainers.items()]
        print(f"examples: {len(setup.train)} training, {len(setup.evaluation)} evaluation")
        print(table_of(works, seconds_a_pass(next(iter(trainers.values())))))
        return
    output.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for name, each in chosen.items():
            runs.append(train(name, seed, each, setup))
            if distributed.rank():
                continue
            print(f"{name}, seed {seed}: {metric} {runs[-1].metrics[metric]:.4f}", flush=True)
            # Written after each run, so that an interruption loses one run only.
            record: dict[str, Any] = {"metric": metric, "test_rows": len(setup.evaluation)}
            record["runs"] = [asdict(run) for run in runs]
            (output / "comparison.json").write_text(json.dumps(record, indent=1))
    if not distributed.rank():
        rows, sentence = table(runs, metric), verdict(runs, metric)
        note = f"Means of {len(seeds)} seeds on {len(setup.evaluation)} rows; ± is one standard "
        note += "error over the seeds, by which differences are paired."
        page = Report("compare", sentence, first.options, note, tables={"Methods": rows})
        print(f"\n{aligned(rows)}\n\n{note}\n{sentence}\n{page.write(output)} has all of it")


def choose_all(argv: Sequence[str]) -> dict[str, Chosen]:
    """The options of each method, which may have an estimator, by its name."""
    of_file, flags = divided("compare", argv)
    specs = {}
    for name in {**of_file, **flags}.get("methods") or METHODS:
        method, _, estimator = name.partition(":")
        if method.endswith(".py"):
            own, _, estimator = estimator.partition(":")
            method = f"{method}:{own}"
        if "=" in method:
            raise ProblemError(f"methods: {name!r} is none; in YAML put an estimator into quotes")
        if estimator and not has_upper_level(find_method(method)()):
            raise ProblemError(f"methods: {method} takes no estimator, got {name!r}")
        specs[name] = method, [f"--hypergradient={estimator}"] * bool(estimator)
    besides = names_of(find_method(method) for method, _ in specs.values())
    return {
        name: choose("compare", CompareArguments, [*argv, *more], method, besides)
        for name, (method, more) in specs.items()
    }


def train(name: str, seed: int, chosen: Chosen, setup: Setup) -> MethodRun:
    """One run, which leaves no files; all methods have the same start for one ``seed``."""
    args = changed(chosen.args, seed=seed, data_seed=seed, output_dir=mkdtemp(dir=cache_folder()))
    if not args.load_best_model_at_end:
        args.save_strategy = type(args.save_strategy)("no")
    trainer = setup.trainer(args, chosen.method)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    tested = {k: x for k, x in trainer.evaluate().items() if not k.endswith(TIMINGS)}
    metrics = {k.removeprefix("eval_"): x for k, x in tested.items() if k.startswith("eval_")}
    return MethodRun(name, seed, metrics, seconds, int(whole(trainer, name).passes))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error, which one seed does not show (NaN).

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


def gaps(runs: Sequence[MethodRun], metric: str) -> dict[str, tuple[float, float]]:
    """Of each method the mean difference to the first in ``metric``, and its error."""
    base = {run.seed: run.metrics[metric] for run in runs if run.method == runs[0].method}
    return {
        name: mean_and_error([x.metrics[metric] - base[x.seed] for x in runs if x.method == name])
        for name in dict.fromkeys(run.method for run in runs)
    }


def verdict(runs: Sequence[MethodRun], metric: str) -> str:
    """Which methods differ from the first by more than twice the standard error, in a sentence.

    Example:
        >>> runs = [MethodRun(name, seed, {"f1": value}, 1.0, 9)
        ...         for name, value in [("lora", 0.5), ("dora", 0.75)] for seed in (0, 1)]
        >>> verdict(runs, "f1")
        'beside lora, dora has a higher f1 by 0.2500 ± 0.0000'
    """
    found = [
        f"{name} has a {'higher' if gap > 0 else 'lower'} {metric} by {abs(gap):.4f} ± {error:.4f}"
        for name, (gap, error) in gaps(runs, metric).items()
        if abs(gap) > 2 * error
    ]
    if found:
        return f"beside {runs[0].method}, {'; '.join(found)}"
    return f"no method differs from {runs[0].method} in {metric} by more than twice its error"


def table(runs: Sequence[MethodRun], metric: str) -> list[list[Any]]:
    """Heads, and a row for each method: the ``metric``, the task's others, passes and seconds."""
    others = [name for name in runs[0].metrics if name != metric]
    heads = ["method", metric, f"difference to {runs[0].method}", *others, "passes", "seconds"]
    rows = [heads]
    for method, (gap, its_error) in gaps(runs, metric).items():
        own = [run for run in runs if run.method == method]
        mean, error = mean_and_error([run.metrics[metric] for run in own])
        difference = "–" if len(rows) == 1 else f"{gap:+.4f} ± {its_error:.4f}"
        means = (f"{fmean(run.metrics[name] for run in own):.4f}" for name in others)
        seconds = f"{fmean(run.seconds for run in own):.1f}"
        rows.append([method, f"{mean:.4f} ± {error:.4f}", difference, *means])
        rows[-1] += [str(own[0].passes), seconds]
    return rows
