"""hyperopt-peft compare: methods with the same data, budget and start, for several seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.options import OutputArguments, divided, names_of
from hyperopt_peft.cli.plan import plan, whole
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.data import cache_folder
from hyperopt_peft.cli.text.setup import SHARED, choose, prepare
from hyperopt_peft.cli.train import metrics_of
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.find import find_method
from hyperopt_peft.trainer.quiet import quiet
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.tables import aligned

METHODS = ["lora", "dora", "bidora"]


@dataclass
class CompareArguments(OutputArguments):
    """The methods and the seeds."""

    methods: list[str] = HfArg(
        default_factory=lambda: list(METHODS), help="each as the option method of train"
    )
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2], help="each method runs once a seed of start and data"
    )


TYPES = (CompareArguments, *SHARED)


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train every method with every seed, write the table and the runs."""
    of_file, flags = divided("compare", argv)
    names = {**of_file, **flags}.get("methods") or METHODS
    besides = names_of(map(find_method, names))
    chosen = [choose("compare", CompareArguments, argv, name, besides) for name in names]
    command, args, output = chosen[0].command, chosen[0].args, Path(chosen[0].args.output_dir)
    command.require_output(args)
    setup = prepare(chosen[0].model, chosen[0].data, args, *(each.method for each in chosen))
    if setup.evaluation is None:
        raise ProblemError("eval_fraction: compare needs evaluation examples; give eval_file")
    budget = args.steps_of(len(setup.train) + len(setup.upper or ()))
    first, seeds = not distributed.rank(), list(dict.fromkeys(command.seeds))
    if first:
        print(f"{budget} steps each; a method with two phases has as many in each", flush=True)
    metric, works, runs = setup.task.metric, [], list[dict[str, Any]]()
    for seed in seeds[: 1 if command.dry_run else None]:
        for each in chosen:
            again = {**(each.args.retrain_arguments or {}), "max_steps": budget}
            steps = {"max_steps": budget, "retrain_arguments": again}
            args = quiet(each.args, cache_folder(), seed=seed, data_seed=seed, **steps)
            trainer = setup.trainer(args, each.method)
            work = whole(trainer, each.name, len(seeds))
            if command.dry_run:
                works.append(work)
                continue
            begin = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - begin
            tested = metrics_of(trainer.evaluate())
            record = {"method": each.name, "seed": seed, "metrics": tested}
            runs.append({**record, "passes": int(work.passes), "seconds": seconds})
            if first:
                print(f"{each.name}, seed {seed}: {metric} {tested[metric]:.4f}", flush=True)
                output.mkdir(parents=True, exist_ok=True)
                # Written after each run, so that an interruption loses one run only.
                every = {"metric": metric, "test_rows": len(setup.evaluation), "runs": runs}
                (output / "comparison.json").write_text(json.dumps(every, indent=1))
    if command.dry_run:
        print(f"examples: {len(setup.train)} training, {len(setup.evaluation)} evaluation")
        print(plan(works, trainer))
    elif first:
        rows = table(runs, metric)
        note = f"Means of {len(seeds)} seeds on {len(setup.evaluation)} rows; ± is one standard "
        note += "error over the seeds, by which differences are paired."
        page = Report("compare", note, chosen[0].options, tables={"Methods": rows})
        print(f"\n{aligned(rows)}\n\n{note}\n{page.write(output)} has all of it")


def table(runs: Sequence[dict[str, Any]], metric: str) -> list[list[str]]:
    """Heads, and a row for each method: its ``metric`` ± standard error, passes and seconds.

    Args:
        runs: one for each seed and method, with the seeds in the same order.
        metric: the name of one of their metrics.
    """
    first = runs[0]["method"]
    rows = [["method", metric, f"difference to {first}", "passes", "seconds"]]
    for method in dict.fromkeys(run["method"] for run in runs):
        values, base = (
            [run["metrics"][metric] for run in runs if run["method"] == name]
            for name in (method, first)
        )
        own = [run for run in runs if run["method"] == method]
        gap = "–"
        if method != first:
            gap = _mean([value - other for value, other in zip(values, base)], "+")
        seconds = fmean(run["seconds"] for run in own)
        rows.append([method, _mean(values), gap, str(own[0]["passes"]), f"{seconds:.1f}"])
    return rows


def _mean(values: Sequence[float], sign: str = "") -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):{sign}.4f} ± {error:.4f}"
