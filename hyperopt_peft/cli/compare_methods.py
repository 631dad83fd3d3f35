"""hyperopt-peft compare: methods side by side, same data, budget and start, several seeds."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg

from hyperopt_peft import split_dataset
from hyperopt_peft.cli.options import parse
from hyperopt_peft.cli.plan import phases
from hyperopt_peft.cli.text.setup import TYPES, Setup, prepare
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.problems import BiDoRATrainingArguments
from hyperopt_peft.utils import distributed

METHODS: tuple[Literal["lora", "dora", "bidora"], ...] = ("lora", "dora", "bidora")


@dataclass
class CompareArguments:
    """Which methods, how often."""

    _argument_group_name = "command"

    methods: list[str] = HfArg(
        default_factory=lambda: list(METHODS),
        help="lora, dora, bidora, or bidora with an estimator: bidora:cg:steps=5,damping=1.0",
    )
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2],
        help="of the start, the split and the order of examples; a run of each method for each",
    )

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if twice := {value for value in values if values.count(value) > 1}:
                raise ProblemError(f"{name}: {min(twice)} is given twice")


@dataclass(frozen=True)
class Run:
    """One method with one seed; ``seconds`` are those of training."""

    method: str
    seed: int
    metrics: dict[str, float]
    seconds: float
    trainable_parameters: int
    steps: int


@dataclass(frozen=True)
class Row:
    """One method; ``mean`` and ``spread`` (sample standard deviation) over the seeds' metrics."""

    method: str
    mean: float
    spread: float | None
    seconds: float
    trainable_parameters: int
    steps: int


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train every method with every seed, write table, picture and JSON.

    Raises:
        ProblemError: a bad option, model or data set; no evaluation examples.
        NonFiniteError: see the option non_finite.
    """
    own, model_args, data, args = parse("compare", __doc__, (CompareArguments, *TYPES), argv)
    chosen = {method: arguments_of(method, args) for method in own.methods}
    setup = prepare(model_args, data)
    if setup.evaluation is None:
        raise ProblemError(
            "compare needs evaluation examples: eval_file, eval_split, eval_fraction"
        )
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    metric, runs = f"eval_{setup.task.metric}", list[Run]()
    for seed in own.seeds:
        budget = steps_in_all(args, setup, seed)
        for method, settings in chosen.items():
            runs.append(train(method, seed, settings, budget, setup))
            if distributed.rank():
                continue
            print(f"{method}, seed {seed}: {metric} {runs[-1].metrics[metric]:.4f}", flush=True)
            # After each, so that an interruption loses one run and not all.
            record = {"metric": metric, "runs": [asdict(each) for each in runs]}
            rows = summarise(runs, metric)
            record["methods"] = [asdict(row) for row in rows]
            (output / "comparison.json").write_text(json.dumps(record, indent=1))
    if distributed.rank():
        return
    table = markdown(rows, metric, len(own.seeds))
    (output / "comparison.md").write_text(f"{table}\n", encoding="utf-8")
    picture(runs, rows, metric, setup.task.lower_is_better, output / "comparison.png")
    print(f"\n{table}\n\ntable, picture and numbers are in {output}")


def arguments_of(method: str, args: BiDoRATrainingArguments) -> BiDoRATrainingArguments:
    """``args`` for ``method``, whose estimator, where it names one, has its own ξ.

    Raises:
        ProblemError: an unknown method or estimator.
    """
    word, _, estimator = method.partition(":")
    name = next((known for known in METHODS if known == word), None)
    if name is None:
        hint = "; in YAML quotes keep the commas of an estimator" if "=" in word else ""
        raise ProblemError(f"methods: unknown method {word!r}{did_you_mean(word, METHODS)}{hint}")
    if ":" in method and name != "bidora":
        raise ProblemError(f"methods: {name} takes no estimator, got {method!r}")
    own = copy.copy(args)
    own.method = name
    if estimator:
        own.hypergradient, own.xi = estimator, None
    own.estimator()
    if not own.load_best_model_at_end:
        own.save_strategy = type(own.save_strategy)("no")
    return own


def steps_in_all(args: BiDoRATrainingArguments, setup: Setup, seed: int) -> int:
    """Lower steps of bidora's search and retraining: the budget of every method."""
    lower, _ = split_dataset(setup.train, args.upper_fraction, seed)
    return sum(phases(args, len(lower), len(setup.train)))


def train(method: str, seed: int, args: BiDoRATrainingArguments, budget: int, setup: Setup) -> Run:
    """One run, from the start that all methods have with this ``seed``."""
    own = copy.copy(args)
    own.seed, own.data_seed = seed, seed
    own.output_dir = str(Path(args.output_dir) / f"{method.replace(':', '-')}-seed{seed}")
    if own.method != "bidora":
        own.max_steps = budget
    model = setup.model(seed, dora=own.method != "lora")
    trainer = setup.trainer(model, own)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    metrics = {key: value for key, value in trainer.evaluate().items() if key != "epoch"}
    steps = trainer.state.global_step
    if trainer.retrainer is not None:
        steps += trainer.retrainer.state.global_step
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Run(method, seed, metrics, seconds, trainable, steps)


def summarise(runs: Sequence[Run], metric: str) -> list[Row]:
    """A row for each method, in the order of ``runs``."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        values = [run.metrics[metric] for run in own]
        rows.append(
            Row(
                method,
                mean=statistics.fmean(values),
                spread=statistics.stdev(values) if len(values) > 1 else None,
                seconds=statistics.fmean(run.seconds for run in own),
                trainable_parameters=own[0].trainable_parameters,
                steps=own[0].steps,
            )
        )
    return rows


def markdown(rows: Sequence[Row], metric: str, seeds: int) -> str:
    """The table."""
    lines = [
        f"| method | {metric}, mean of {seeds} | spread | seconds | trainable parameters | steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = "–" if row.spread is None else f"{row.spread:.4f}"
        lines.append(
            f"| {row.method} | {row.mean:.4f} | {spread} | {row.seconds:.1f} "
            f"| {row.trainable_parameters:,} | {row.steps} |"
        )
    return "\n".join(lines)


def picture(
    runs: Sequence[Run], rows: Sequence[Row], metric: str, lower_is_better: bool, path: Path
) -> None:
    """Every run a dot, every method's mean and spread a bar, a method a column."""
    figure = Figure(figsize=(max(4.0, 1.6 * len(rows)), 4), layout="constrained")
    axes = figure.add_subplot()
    for column, row in enumerate(rows):
        values = [run.metrics[metric] for run in runs if run.method == row.method]
        axes.scatter([column] * len(values), values, s=30, color=f"C{column}", alpha=0.6)
        bar = row.spread if row.spread is not None and math.isfinite(row.spread) else 0.0
        axes.errorbar(column + 0.15, row.mean, bar, fmt="_", markersize=12, color=f"C{column}")
    names = [row.method.replace(":", ":\n") for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize="small")
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylabel(f"{metric} ({'lower' if lower_is_better else 'higher'} is better)")
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=150)
