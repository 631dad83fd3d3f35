"""hyperopt-peft compare: methods with the same data, budget and start, for several seeds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction
from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.options import OutputArguments, parse
from hyperopt_peft.cli.plan import seconds_a_pass, whole
from hyperopt_peft.cli.plan import table as table_of
from hyperopt_peft.cli.report import Report
from hyperopt_peft.cli.text.setup import SHARED, Method, MethodArguments, Setup, changed, prepare
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.trainer.logs import TIMINGS
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.plots import intervals
from hyperopt_peft.utils.tables import aligned

METHODS = get_args(Method)[::-1]
#: The share of a run's steps between two logs: the runs are many.
FEW_LOGS = 0.25
#: Bootstrap samples of the test rows.
DRAWS = 200

Numbers = NDArray[np.float64]


@dataclass
class CompareArguments(OutputArguments):
    """The methods and the seeds."""

    methods: list[str] = HfArg(
        default_factory=lambda: list(METHODS),
        help="lora, dora, bidora, or bidora with an estimator: bidora:cg:steps=5,damping=1.0",
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
    """One method with one seed.

    ``draws`` has the compared metric on `DRAWS` bootstrap samples of the test rows, the same ones
    for every run, so that runs can be compared draw by draw; shape (DRAWS,).
    """

    method: str
    seed: int
    metrics: dict[str, float]
    seconds: float
    passes: int
    draws: Numbers


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train every method with every seed, write the table and the runs."""
    (command, model_args, data, args), flags = parse("compare", TYPES, argv)
    command.require_output(args)
    chosen = {method: arguments_of(method, args) for method in command.methods}
    setup = prepare(model_args, data)
    if setup.evaluation is None:
        raise ProblemError("eval_fraction: compare needs evaluation examples; give eval_file")
    output = Path(args.output_dir)
    metric, runs, size = f"eval_{setup.task.metric}", list[MethodRun](), len(setup.evaluation)
    budget = args.steps_of(len(setup.train))
    for settings in chosen.values():
        settings.max_steps = budget
        again: Any = settings.retrain_arguments or {}
        settings.retrain_arguments = {**again, "max_steps": budget}
    if not distributed.rank():
        phases = "; bidora has as many in each of its phases, whatever retrain_arguments are"
        print(f"{budget} steps each{phases if 'bidora' in chosen else ''}", flush=True)
    if command.dry_run:
        print(plan(chosen, setup, len({*command.seeds})))
        return
    output.mkdir(parents=True, exist_ok=True)
    for seed in dict.fromkeys(command.seeds):
        for method, settings in chosen.items():
            result = train(method, seed, settings, setup)
            runs.append(result)
            if distributed.rank():
                continue
            value = f"{result.metrics[metric]:.4f} ± {result.draws.std():.4f} on {size} rows"
            print(f"{method}, seed {seed}: {setup.task.metric} {value}", flush=True)
            # Written after each run, so that an interruption loses one run only.
            records = [{**asdict(run), "draws": run.draws.tolist()} for run in runs]
            record = {"metric": metric, "test_rows": size, "runs": records}
            (output / "comparison.json").write_text(json.dumps(record, indent=1))
    if not distributed.rank():
        rows, note, sentence = *table(runs, metric, size), verdict(runs, metric)
        draw_comparison(runs, metric, output / "comparison.png")
        for folder in sorted((path for path in output.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):  # a Trainer makes its folder, and has saved nothing
                folder.rmdir()
        page = Report(
            "compare",
            sentence,
            flags,
            subtitle=note,
            pictures={"Differences to the first method": output / "comparison.png"},
            tables={"Methods": rows},
        )
        print(f"\n{aligned(rows)}\n\n{note}\n{sentence}\n{page.write(output)} has all of it")


def arguments_of(name: str, args: MethodArguments) -> MethodArguments:
    """``args`` for the method ``name``, which may have an estimator."""
    method, colon, estimator = name.partition(":")
    if method not in METHODS:
        hint = "; in YAML quotes keep the commas of an estimator" if "=" in method else ""
        raise ProblemError(
            f"methods: unknown method {method!r}{did_you_mean(method, METHODS)}{hint}"
        )
    if colon and method != "bidora":
        raise ProblemError(f"methods: {method} takes no estimator, got {name!r}; give {method!r}")
    settings: MethodArguments = changed(args, method=method)
    if settings.logging_steps == MethodArguments.logging_steps:
        settings.logging_steps = FEW_LOGS
    if estimator:
        settings.hypergradient, settings.xi = estimator, None
    settings.estimator()
    if not settings.load_best_model_at_end:
        settings.save_strategy = type(settings.save_strategy)("no")
    return settings


def plan(chosen: Mapping[str, MethodArguments], setup: Setup, seeds: int) -> str:
    """The trainings of each method in lines, and their time."""
    works, seconds = [], 0.0
    for method, settings in chosen.items():
        trainer = setup.trainer(settings)
        seconds = seconds or seconds_a_pass(trainer)
        works.append(whole(setup, trainer, method, seeds))
    rows = f"{len(setup.train)} training, {len(setup.evaluation or ())} evaluation"
    return f"examples: {rows}\n{table_of(works, seconds)}"


def train(method: str, seed: int, args: MethodArguments, setup: Setup) -> MethodRun:
    """One run; all methods have the same start for one ``seed``."""
    folder = str(Path(args.output_dir or "") / f"{method.replace(':', '-')}-seed{seed}")
    args = changed(args, seed=seed, data_seed=seed, output_dir=folder)
    trainer = setup.trainer(args)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    tested = trainer.predict(setup.evaluation, metric_key_prefix="eval")
    draws = bootstrap(
        lambda rows: setup.task.metrics(rows)[setup.task.metric],
        tested.predictions,
        tested.label_ids,
    )
    passes = int(whole(setup, trainer, method).passes)
    return MethodRun(method, seed, tested.metrics, seconds, passes, draws)


def bootstrap(metric: Callable[[Any], float], predictions: Any, labels: Any) -> Numbers:
    """``metric`` on `DRAWS` samples with replacement of the test rows, the same at every call.

    The standard deviation of the result, of shape (DRAWS,), is the standard error of the metric as
    an estimate for the population of the test rows (Efron 1979, doi:10.1214/aos/1176344552).
    """
    samples = np.random.default_rng(0).integers(len(labels), size=(DRAWS, len(labels)))
    return np.array([metric(EvalPrediction(predictions[rows], labels[rows])) for rows in samples])


def mean_and_error(values: Sequence[float], draws: Sequence[Numbers]) -> tuple[float, float]:
    """The mean over k seeds and its standard error, √(s²/k + e²).

    s is the sample standard deviation over the seeds (0 for one seed), and e the standard deviation
    over bootstrap draws of the mean over the seeds, which share the test rows.
    """
    over_seeds = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
    over_rows = float(np.nanvar(np.mean(draws, axis=0)))
    return float(np.mean(values)), math.sqrt(over_seeds + over_rows)


def method_means(
    runs: Sequence[MethodRun], metric: str
) -> dict[str, tuple[float, float, float, float]]:
    """Of each method the mean ``metric`` and the difference to the first, each with its error."""
    baseline = {run.seed: run for run in runs if run.method == runs[0].method}
    result = {}
    for method in dict.fromkeys(run.method for run in runs):
        pairs = [(run, baseline[run.seed]) for run in runs if run.method == method]
        mean = mean_and_error(
            [run.metrics[metric] for run, _ in pairs], [x.draws for x, _ in pairs]
        )
        difference = mean_and_error(
            [run.metrics[metric] - other.metrics[metric] for run, other in pairs],
            [run.draws - other.draws for run, other in pairs],
        )
        result[method] = *mean, *difference
    return result


def verdict(runs: Sequence[MethodRun], metric: str) -> str:
    """Which methods differ from the first by more than twice the standard error, in a sentence.

    Example:
        >>> import numpy as np
        >>> runs = [MethodRun(name, 0, {"f1": value}, 1.0, 9, np.zeros(2))
        ...         for name, value in [("lora", 0.5), ("dora", 0.75)]]
        >>> verdict(runs, "f1")
        'beside lora, dora has a higher f1 by 0.2500 ± 0.0000'
    """
    name, found = metric.removeprefix("eval_"), []
    for method, (_, _, gap, error) in method_means(runs, metric).items():
        if abs(gap) > 2 * error:
            word = "higher" if gap > 0 else "lower"
            found.append(f"{method} has a {word} {name} by {abs(gap):.4f} ± {error:.4f}")
    if found:
        return f"beside {runs[0].method}, {'; '.join(found)}"
    cheapest = min(runs, key=lambda run: run.passes)
    return (
        f"no method differs from {runs[0].method} in {name} by more than twice the standard error; "
        f"{cheapest.method} has the fewest passes ({cheapest.passes})"
    )


def draw_comparison(runs: Sequence[MethodRun], metric: str, path: Path) -> None:
    """The differences to the first method, paired, ± two standard errors, beside the means."""
    gaps = {
        f"{method}, {mean:.3f}": (gap, gap - 2 * error, gap + 2 * error)
        for method, (mean, _, gap, error) in method_means(runs, metric).items()
    }
    name = metric.removeprefix("eval_")
    title = f"{name} − that of {runs[0].method}, paired, ± two standard errors"
    intervals({title: gaps}, path, zero=[title])


def table(runs: Sequence[MethodRun], metric: str, size: int) -> tuple[list[list[str]], str]:
    """The means of ``runs`` over the seeds and their errors, and a note on ``size`` test rows.

    Heads, then a row for each method; columns for the compared ``metric``, the task's others and
    the loss.
    """
    others = [x for x in runs[0].metrics if x != metric and not x.endswith(TIMINGS)]
    heads = ["method", metric, f"difference to {runs[0].method}", *others]
    heads = [head.removeprefix("eval_") for head in heads]
    lines = [[*heads, "passes", "seconds"]]
    for method, (mean, error, difference, its_error) in method_means(runs, metric).items():
        seeds = [run for run in runs if run.method == method]
        lines.append(
            [
                method,
                f"{mean:.4f} ± {error:.4f}",
                "–" if method == runs[0].method else f"{difference:+.4f} ± {its_error:.4f}",
                *(f"{np.mean([run.metrics[name] for run in seeds]):.4f}" for name in others),
                str(seeds[0].passes),
                f"{np.mean([run.seconds for run in seeds]):.1f}",
            ]
        )
    count = len({run.seed for run in runs})
    of = " and of the seeds" if count > 1 else "; one seed shows none of its own"
    return lines, (
        f"Means of {count} seed{'s' * (count > 1)} on {size} test rows; "
        f"± is one standard error, of the test rows{of}. Differences are paired by seed and row."
    )
