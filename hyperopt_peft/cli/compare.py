"""hyperopt-peft compare: methods with the same data, budget and start, for several seeds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from tempfile import mkdtemp
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.options import OutputArguments, divided, names_of
from hyperopt_peft.cli.plan import plan, whole
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.cli.text.setup import SHARED, Chosen, Setup, changed, choose, prepare
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.find import find_method
from hyperopt_peft.trainer.logs import TIMINGS
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.tables import aligned

METHODS = ["lora", "dora", "bidora"]
#: A run: method, seed, metrics, passes and seconds.
Run = dict[str, Any]


@dataclass
class CompareArguments(OutputArguments):
    """The methods and the seeds."""

    methods: list[str] = HfArg(
        default_factory=lambda: list(METHODS), help="each as the option method of train"
    )
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2],
        help="of the start, the split and the order of examples; each method runs once a seed",
    )

    def __post_init__(self) -> None:
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ProblemError(f"seeds must be in [0, 2³²), got {wrong[0]}")


TYPES = (CompareArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train every method with every seed, write the table and the runs."""
    of_file, flags = divided("compare", argv)
    names = {**of_file, **flags}.get("methods") or METHODS
    besides = names_of(map(find_method, names))
    chosen = [choose("compare", CompareArguments, argv, name, besides) for name in names]
    command, args = chosen[0].command, chosen[0].args
    command.require_output(args)
    output, seeds = Path(args.output_dir), list(dict.fromkeys(command.seeds))
    setup = prepare(chosen[0].model, chosen[0].data, args, *(each.method for each in chosen))
    if setup.evaluation is None:
        raise ProblemError("eval_fraction: compare needs evaluation examples; give eval_file")
    budget = args.steps_of(len(setup.train) + len(setup.upper or ()))
    for each in chosen:
        again = {**(each.args.retrain_arguments or {}), "max_steps": budget}
        each.args = changed(each.args, max_steps=budget, retrain_arguments=again)
        each.args.output_dir = mkdtemp(dir=cache_folder())  # of runs that leave no files
    if not distributed.rank():
        print(f"{budget} steps each; a method with two phases has as many in each", flush=True)
    if command.dry_run:
        trainers = [setup.trainer(each.args, each.method) for each in chosen]
        works = [whole(t, name, len(seeds)) for t, name in zip(trainers, names)]
        print(f"examples: {len(setup.train)} training, {len(setup.evaluation)} evaluation")
        print(plan(works, trainers[0]))
        return
    output.mkdir(parents=True, exist_ok=True)
    metric, runs = setup.task.metric, list[Run]()
    for seed in seeds:
        for each in chosen:
            runs.append(train(each, seed, setup))
            if not distributed.rank():
                value = runs[-1]["metrics"][metric]
                print(f"{each.name}, seed {seed}: {metric} {value:.4f}", flush=True)
                # Written after each run, so that an interruption loses one run only.
                record = {"metric": metric, "test_rows": len(setup.evaluation), "runs": runs}
                (output / "comparison.json").write_text(json.dumps(record, indent=1))
    if not distributed.rank():
        rows = table(runs, metric)
        note = f"Means of {len(seeds)} seeds on {len(setup.evaluation)} rows; ± is one standard "
        note += "error over the seeds, by which differences are paired."
        page = Report("compare", note, chosen[0].options, tables={"Methods": rows})
        print(f"\n{aligned(rows)}\n\n{note}\n{page.write(output)} has all of it")


def train(chosen: Chosen, seed: int, setup: Setup) -> Run:
    """One run; all methods have the same start for one ``seed``."""
    args = changed(chosen.args, seed=seed, data_seed=seed)
    if not args.load_best_model_at_end:
        args.save_strategy = type(args.save_strategy)("no")
    trainer = setup.trainer(args, chosen.method)
    begin = time.perf_counter()
    trainer.train()
    seconds, passes = time.perf_counter() - begin, int(whole(trainer, chosen.name).passes)
    tested = {k: x for k, x in trainer.evaluate().items() if not k.endswith(TIMINGS)}
    metrics = {k.removeprefix("eval_"): x for k, x in tested.items() if k.startswith("eval_")}
    run = {"method": chosen.name, "seed": seed, "metrics": metrics}
    return {**run, "passes": passes, "seconds": seconds}


def mean(values: Sequence[float], sign: str = "") -> str:
    """The mean over seeds ± its standard error, which one seed does not show.

    Example:
        >>> mean([1.0, 3.0]), mean([1.0], "+")
        ('2.0000 ± 1.0000', '+1.0000 ± nan')
    """
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):{sign}.4f} ± {error:.4f}"


def table(runs: Sequence[Run], metric: str) -> list[list[str]]:
    """Heads, and a row for each method: the ``metric``, the task's others, passes and seconds."""
    first = runs[0]["method"]
    base = {run["seed"]: run["metrics"][metric] for run in runs if run["method"] == first}
    others = [name for name in runs[0]["metrics"] if name != metric]
    rows = [["method", metric, f"difference to {first}", *others, "passes", "seconds"]]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        gaps = [run["metrics"][metric] - base[run["seed"]] for run in own]
        rows.append([method, mean([run["metrics"][metric] for run in own])])
        rows[-1] += [mean(gaps, "+") if rows[2:] else "–"]
        rows[-1] += [f"{fmean(run['metrics'][name] for run in own):.4f}" for name in others]
        rows[-1] += [str(own[0]["passes"]), f"{fmean(run['seconds'] for run in own):.1f}"]
    return rows
