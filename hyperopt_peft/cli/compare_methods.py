"""hyperopt-peft compare: methods with the same data, budget and start, for several seeds."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from hyperopt_peft import split_dataset
from hyperopt_peft.cli.comparison import Run, bootstrap, markdown, picture, summarise
from hyperopt_peft.cli.options import parse, require_folder
from hyperopt_peft.cli.plan import phases
from hyperopt_peft.cli.text.setup import TYPES, MethodArguments, Setup, prepare
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.utils import distributed

METHODS: tuple[Literal["lora", "dora", "bidora"], ...] = ("lora", "dora", "bidora")


@dataclass
class CompareArguments:
    """The methods and the seeds."""

    _argument_group_name = "command"

    methods: list[str] = HfArg(
        default_factory=lambda: list(METHODS),
        help="lora, dora, bidora, or bidora with an estimator: bidora:cg:steps=5,damping=1.0",
    )
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2],
        help="of the start, the split and the order of examples; each method runs once a seed",
    )

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if twice := {value for value in values if values.count(value) > 1}:
                raise ProblemError(f"{name}: {min(twice)} is given twice; leave one out")


def run(argv: Sequence[str]) -> None:
    """Parse ``argv``, train every method with every seed, write table, picture and JSON.

    Raises:
        ProblemError: a bad option, model or data set; no evaluation examples.
        NonFiniteError: see the option non_finite.
    """
    own, model_args, data, args = parse("compare", (CompareArguments, *TYPES), argv)
    chosen = {method: arguments_of(method, args) for method in own.methods}
    require_folder(args.output_dir)
    setup = prepare(model_args, data)
    if setup.evaluation is None:
        raise ProblemError(
            "eval_fraction: compare needs evaluation examples; give eval_file, eval_split or "
            "eval_fraction"
        )
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    metric, runs, size = f"eval_{setup.task.metric}", list[Run](), len(setup.evaluation)
    for seed in own.seeds:
        budget = steps_in_all(args, setup, seed)
        for method, settings in chosen.items():
            found = train(method, seed, settings, budget, setup)
            runs.append(found)
            if distributed.rank():
                continue
            value = f"{found.metrics[metric]:.4f} ± {found.draws.std():.4f} on {size} rows"
            print(f"{method}, seed {seed}: {setup.task.metric} {value}", flush=True)
            # Written after each run, so that an interruption loses one run only.
            rows = summarise(runs, metric)
            record = {
                "metric": metric,
                "test_rows": size,
                "runs": [each.record() for each in runs],
                "methods": [asdict(row) for row in rows],
            }
            (output / "comparison.json").write_text(json.dumps(record, indent=1))
    if distributed.rank():
        return
    table = markdown(rows, metric, others(runs[0].metrics, metric), len(own.seeds), size)
    (output / "comparison.md").write_text(f"{table}\n", encoding="utf-8")
    picture(runs, rows, metric, setup.task.lower_is_better, output / "comparison.png")
    print(f"\n{table}\n\ntable, picture and numbers are in {output}")


def others(metrics: Iterable[str], metric: str) -> list[str]:
    """The task's metrics and the loss beside ``metric``, without the Trainer's timings."""
    timings = ("_runtime", "_per_second", "_time")
    return [name for name in metrics if name != metric and not name.endswith(timings)]


def arguments_of(method: str, args: MethodArguments) -> MethodArguments:
    """``args`` for ``method``, with the estimator that ``method`` may name.

    Raises:
        ProblemError: an unknown method or estimator.
    """
    word, _, estimator = method.partition(":")
    name = next((known for known in METHODS if known == word), None)
    if name is None:
        hint = "; in YAML quotes keep the commas of an estimator" if "=" in word else ""
        raise ProblemError(f"methods: unknown method {word!r}{did_you_mean(word, METHODS)}{hint}")
    if ":" in method and name != "bidora":
        raise ProblemError(f"methods: {name} takes no estimator, got {method!r}; give {name!r}")
    own = copy.copy(args)
    own.method = name
    if estimator:
        own.hypergradient, own.xi = estimator, None
    own.estimator()
    if not own.load_best_model_at_end:
        own.save_strategy = type(own.save_strategy)("no")
    return own


def steps_in_all(args: MethodArguments, setup: Setup, seed: int) -> int:
    """The lower steps of bidora's search and retraining, which are the budget of every method."""
    lower, _ = split_dataset(setup.train, args.upper_fraction, seed)
    return sum(phases(args, len(lower), len(setup.train)))


def train(method: str, seed: int, args: MethodArguments, budget: int, setup: Setup) -> Run:
    """One run; all methods have the same start for one ``seed``."""
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
    tested = trainer.predict(setup.evaluation, metric_key_prefix="eval")
    draws = bootstrap(
        lambda rows: setup.task.metrics(rows)[setup.task.metric],
        tested.predictions,
        tested.label_ids,
    )
    steps = trainer.state.global_step
    if (retrainer := getattr(trainer, "retrainer", None)) is not None:
        steps += retrainer.state.global_step
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Run(method, seed, tested.metrics, draws, seconds, trainable, steps)
