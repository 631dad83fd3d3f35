"""hyperopt-peft compare: methods with the same data, budget and start, for several seeds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.options import OutputArguments, divided, names_of
from hyperopt_peft.cli.plan import seconds_a_pass, whole
from hyperopt_peft.cli.plan import table as table_of
from hyperopt_peft.cli.report import Report
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
    command, args = first.command, first.args
    command.require_output(args)
    tags = {tag for each in chosen.values() for tag in each.method.tags}
    setup = prepare(first.model, first.data, args, sorted(tags))
    if setup.evaluation is None:
        raise ProblemError("eval_fraction: compare needs evaluation examples; give eval_file")
    budget = args.steps_of(len(setup.train) + len(setup.upper or ()))
    for each in chosen.values():
        again = {**(each.args.retrain_arguments or {}), "max_steps": budget}
        each.args = changed(each.args, max_steps=budget, retrain_arguments=again)
        each.args.output_dir = args.output_dir
        if not each.args.load_best_model_at_end:
            each.args.save_strategy = type(args.save_strategy)("no")
    if not distributed.rank():
        print(f"{budget} steps each; a method with two phases has as many in each", flush=True)
    if command.dry_run:
        print(plan(chosen, setup, len({*command.seeds})))
        return
    output, metric, runs = Path(args.output_dir), f"eval_{setup.task.metric}", list[MethodRun]()
    output.mkdir(parents=True, exist_ok=True)
    for seed in dict.fromkeys(command.seeds):
        for name, each in chosen.items():
            runs.append(train(name, seed, each, setup))
            if distributed.rank():
                continue
            print(f"{name}, seed {seed}: {metric} {runs[-1].metrics[metric]:.4f}", flush=True)
            # Written after each run, so that an interruption loses one run only.
            record = {"metric": metric, "test_rows": len(setup.evaluation)}
            record["runs"] = [asdict(run) for run in runs]
            (output / "comparison.json").write_text(json.dumps(record, indent=1))
    if not distributed.rank():
        rows, note = table(runs, metric), f"means of {len({*command.seeds})} seeds on "
        note += f"{len(setup.evaluation)} rows; ± is one standard error over the seeds, paired"
        sentence = verdict(runs, metric)
        for folder in sorted((path for path in output.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):  # a Trainer makes its folder, and has saved nothing
                folder.rmdir()
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
            raise ProblemError(
                f"methods: {name!r} is no method; in YAML quotes keep the commas of an estimator"
            )
        if estimator and not has_upper_level(find_method(method)()):
            raise ProblemError(f"methods: {method} takes no estimator, got {name!r}")
        specs[name] = method, [f"--hypergradient={estimator}"] * bool(estimator)
    besides = names_of(find_method(method) for method, _ in specs.values())
    return {
        name: choose("compare", CompareArguments, [*argv, *more], method, besides)
        for name, (method, more) in specs.items()
    }


def plan(chosen: dict[str, Chosen], setup: Setup, seeds: int) -> str:
    """The trainings of each method in lines, and their time."""
    works, seconds = [], 0.0
    for name, each in chosen.items():
        trainer = setup.trainer(each.args, each.method)
        seconds = seconds or seconds_a_pass(trainer)
        works.append(whole(trainer, name, seeds))
    rows = f"{len(setup.train)} training, {len(setup.evaluation or ())} evaluation"
    return f"examples: {rows}\n{table_of(works, seconds)}"


def train(name: str, seed: int, chosen: Chosen, setup: Setup) -> MethodRun:
    """One run; all methods have the same start for one ``seed``."""
    folder = Path(chosen.args.output_dir) / f"{name.replace('/', '-').replace(':', '-')}-seed{seed}"
    args = changed(chosen.args, seed=seed, data_seed=seed, output_dir=str(folder))
    trainer = setup.trainer(args, chosen.method)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    metrics = {k: float(x) for k, x in trainer.evaluate().items() if not k.endswith(TIMINGS)}
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
    name, found = metric.removeprefix("eval_"), []
    for method, (gap, error) in gaps(runs, metric).items():
        if abs(gap) > 2 * error:
            word = "higher" if gap > 0 else "lower"
            found.append(f"{method} has a {word} {name} by {abs(gap):.4f} ± {error:.4f}")
    if found:
        return f"beside {runs[0].method}, {'; '.join(found)}"
    return f"no method differs from {runs[0].method} in {name} by more than twice its error"


def table(runs: Sequence[MethodRun], metric: str) -> list[list[Any]]:
    """Heads, and a row for each method: the ``metric``, the task's others, passes and seconds."""
    others = [name for name in runs[0].metrics if name.startswith("eval_") and name != metric]
    heads = [metric, f"difference to {runs[0].method}", *others]
    rows: list[list[Any]] = [["method", *(x.removeprefix("eval_") for x in heads)]]
    rows[0] += ["passes", "seconds"]
    for method, (gap, its_error) in gaps(runs, metric).items():
        own = [run for run in runs if run.method == method]
        mean, error = mean_and_error([run.metrics[metric] for run in own])
        row: list[Any] = [method, f"{mean:.4f} ± {error:.4f}", f"{gap:+.4f} ± {its_error:.4f}"]
        row += [f"{fmean(run.metrics[name] for run in own):.4f}" for name in others]
        rows.append([*row, own[0].passes, f"{fmean(run.seconds for run in own):.1f}"])
    rows[1][2] = "–"
    return rows
