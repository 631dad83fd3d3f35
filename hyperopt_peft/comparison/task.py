"""One run of a comparison: a method, a seed and rates; from the data to a score."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, set_seed

from hyperopt_peft.comparison.budget import phases, rows_of, steps_for
from hyperopt_peft.comparison.folds import Rows
from hyperopt_peft.comparison.frozen_layers import compute_once
from hyperopt_peft.comparison.watch import Watch
from hyperopt_peft.core.problem import Problem, TaskLoss
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.data import shared_rows
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.passes import PassCounter
from hyperopt_peft.trainer.quiet import no_bars
from hyperopt_peft.trainer.trainer import BilevelTrainer

#: A method as it is; its upper variables frozen; or all of its variables in one level on all rows.
Kind = Literal["method", "frozen", "one level"]


@dataclass(frozen=True)
class Run:
    """What distinguishes a run from the others of a comparison.

    Attributes:
        method: its name.
        kind: the method, or one of its two ablations.
        seed: of the held-out rows, the split, the start and the order.
        rate: the peak learning rate of the lower level.
        upper_rate: that of the upper level; None is that of the arguments.
        development: whether the score is that of rows held out from the training rows, not of the
            test rows.
    """

    method: str
    kind: Kind
    seed: int
    rate: float
    upper_rate: float | None = None
    development: bool = False

    def __str__(self) -> str:
        kind = "" if self.kind == "method" else f", {self.kind}"
        upper = "" if self.upper_rate is None else f", upper rate {self.upper_rate:g}"
        return f"{self.method}{kind}, seed {self.seed}, rate {self.rate:g}{upper}"


@dataclass(frozen=True)
class Price:
    """What the steps of a method cost.

    Attributes:
        batch: the rows of a lower step.
        lower, everything: the rows of the lower level, and of both levels.
        every: the lower steps from one upper step to the next; 0 without an upper level.
        upper: the rows that an upper step sends through the model beside those of its lower step.
        again: whether a second training follows.
        start, a_pass: the seconds before the first step, and those of a pass.
    """

    batch: int
    lower: int
    everything: int
    every: int
    upper: float
    again: bool
    start: float
    a_pass: float

    def spent(self, steps: Sequence[int]) -> dict[str, float]:
        """The passes of ``steps``: of lower steps, of upper steps, and of the second training."""
        first = rows_of(steps[0], self.lower if self.every else self.everything, self.batch)
        upper = steps[0] // self.every * self.upper if self.every else 0
        again = rows_of(steps[1], self.everything, self.batch) if len(steps) > 1 else 0
        rows = {"lower steps": first, "upper steps": upper, "second training": again}
        return {name: each / self.batch for name, each in rows.items()}

    def steps(self, passes: float, args: Any) -> list[int]:
        """The steps of each phase of a run of ``passes`` passes."""
        sizes = self.sizes(passes, args)
        again = [sizes["retrain_arguments"]["max_steps"]] if self.again else []
        return [sizes["max_steps"], *again]

    def sizes(self, passes: float, args: Any) -> dict[str, Any]:
        """The arguments with which a run takes ``passes`` passes."""
        if not self.every:
            return {"max_steps": steps_for(passes * self.batch, self.everything, self.batch)}
        search, again = phases(
            passes,
            lower=self.lower,
            everything=self.everything,
            batch=self.batch,
            every=self.every,
            upper=self.upper,
            again=self.again,
        )
        sizes: dict[str, Any] = {"max_steps": search}
        if self.again:
            sizes["retrain_arguments"] = {**(args.retrain_arguments or {}), "max_steps": again}
        return sizes


@dataclass
class Task:
    """What all runs of a comparison share; it is pickled for other processes.

    Attributes:
        methods: by name.
        base_model: makes the model before it has an adapter.
        adapter: the PEFT config, which a method may change; None where ``base_model`` adapts.
        args: the arguments of all methods.
        data: the rows.
        passes: the budget of a run.
        metric: the name of the score, without ``eval_``; ``loss`` is better where it is lower.
        trainer: the class of the trainer.
        options: further arguments of the trainer.
        frozen_dropout: whether frozen lower layers keep their dropout.
        layers: how many layers of the last model are computed once, in words.
    """

    methods: Mapping[str, Method]
    base_model: Callable[[], Any]
    adapter: Any
    args: BilevelTrainingArguments
    data: Rows
    passes: float
    metric: str
    trainer: type[BilevelTrainer] = BilevelTrainer
    options: Mapping[str, Any] = field(default_factory=dict)
    frozen_dropout: bool = True
    layers: str = ""

    @no_bars()
    def run(self, run: Run, price: Price) -> dict[str, Any]:
        """Train and score; the entries of ``run`` with score, passes, seconds and steps.

        The score is NaN where a loss is not finite.

        Raises:
            ProblemError: the run took more passes than its budget; the metric is unknown; as
                `BilevelTrainer`.
        """
        begin = time.perf_counter()
        rows = self.data.of(run.seed, run.development)
        with tempfile.TemporaryDirectory(prefix="comparison-") as folder:
            sizes = price.sizes(self.passes, self.args)
            trainer = self.make(run, rows, folder, **sizes)
            trainer.passes.limit = self.passes
            watch = Watch(trainer, run.method)
            peak = peak_memory()
            metrics: dict[str, Any] = {}
            with suppress(NonFiniteError):  # such as a rate that is too high; it has no score
                trainer.train()
                watch.check()
                metrics = (trainer.retrainer or trainer).evaluate()
        phases_run = [x for x in (trainer, trainer.retrainer) if x is not None]
        steps = [each.state.global_step for each in phases_run]
        planned = sum(each.args.max_steps for each in phases_run)
        if metrics and sum(steps) < 0.8 * planned:
            raise ProblemError(
                f"{run.method}: its {self.passes:g} passes ended after {sum(steps)} of {planned} "
                "steps, since later steps send more rows through the model than the first ones"
            )
        return {
            **asdict(run),
            "score": metrics.get(f"eval_{self.metric}", math.nan),
            "metrics": {k: v for k, v in metrics.items() if isinstance(v, float)},
            "passes": trainer.passes.passes,
            "steps": steps,
            "spent": price.spent(steps),
            "seconds": time.perf_counter() - begin,
            "memory": peak(),
            "layers": self.layers,
            "finish": watch.change,
        }

    @no_bars()
    def price(self, run: Run) -> Price:
        """What the steps of ``run`` cost, by its first two upper steps, or four lower ones."""
        begin = time.perf_counter()
        data = self.data.of(run.seed, run.development)
        with tempfile.TemporaryDirectory(prefix="comparison-") as folder:
            sizes: dict[str, Any] = {"max_steps": 4, "retrain": "none"}
            trainer = self.make(run, data, folder, **sizes)
            args, bilevel = trainer.args, trainer.upper is not None
            if bilevel and 2 * args.lower_steps != sizes["max_steps"]:
                sizes["max_steps"] = 2 * args.lower_steps
                trainer = self.make(run, data, folder, **sizes)
            rows = trainer.eval_dataset  # as the trainer has prepared them
            self.require_metric(trainer.evaluate(rows.select(range(min(len(rows), 8)))))
            made = time.perf_counter()
            trainer.add_callback(clock := _Clock(trainer.passes))
            try:
                trainer.train()
            except NonFiniteError as error:
                where, _, _ = str(error).partition(";")
                raise ProblemError(f"{run}: {where}; give lower rates") from error
        self._require_unseen(trainer, run.method, data[2])
        batch = args.train_batch_size * args.gradient_accumulation_steps
        lower, everything = rows_of_phases(trainer)
        if trainer.passes.joined:  # each batch counts as a whole one
            lower, everything = (-(-rows // batch) * batch for rows in (lower, everything))
        passes, steps = trainer.passes.passes, sizes["max_steps"]
        return Price(
            batch=batch,
            lower=lower,
            everything=everything,
            every=args.lower_steps if bilevel else 0,
            upper=(passes * batch - rows_of(steps, lower, batch)) / 2 if bilevel else 0.0,
            again=bilevel and self._retrain(run) != "none",
            start=made - begin,
            a_pass=clock.seconds_a_pass(),
        )

    def _retrain(self, run: Run) -> str:
        retrain: str = self.args.with_defaults(self.methods[run.method].defaults).retrain
        return retrain

    def require_metric(self, metrics: Mapping[str, Any]) -> None:
        """Raise ProblemError where ``metrics`` of an evaluation lack the score."""
        if f"eval_{self.metric}" not in metrics:
            known = ", ".join(sorted(metrics)).replace("eval_", "")
            raise ProblemError(
                f"metric: {self.metric} is none of {known}; give compute_metrics another"
            )

    def _require_unseen(self, trainer: BilevelTrainer, name: str, test: Any) -> None:
        """Raise ProblemError if ``trainer`` has test rows, which its method brings along."""
        for rows in (trainer.train_dataset, trainer.upper_dataset, trainer.all_rows()):
            if not {*test.column_names} <= {*getattr(rows, "column_names", ())}:
                continue
            if common := shared_rows(test, rows):
                raise ProblemError(
                    f"{name}: trains on {len(common)} of {len(test)} test rows; let rows and "
                    "all_rows return rows of train_dataset alone"
                )

    def make(self, run: Run, rows: Sequence[Any], folder: str, **sizes: Any) -> BilevelTrainer:
        """A trainer of ``run``, which writes and shows nothing."""
        method = copy.deepcopy(self.methods[run.method])
        if run.kind == "one level":
            method = OneLevel(method)
        quiet = {"save_strategy": "no", "eval_strategy": "no", "report_to": [], "seed": run.seed}
        quiet |= {"output_dir": folder, "disable_tqdm": True, "logging_strategy": "no"}
        args = copy.copy(self.args)
        for name, value in (quiet | {"learning_rate": run.rate} | sizes).items():
            setattr(args, name, value)
        upper_rate = 0.0 if run.kind == "frozen" else run.upper_rate
        if upper_rate is not None:
            args.upper_learning_rate = upper_rate
        set_seed(run.seed)
        model, options = self.base_model(), dict(self.options)
        if self.adapter is not None:
            options["peft_config"] = None
            model = _adapted(model, method.adapter(copy.deepcopy(self.adapter)))
        trainer = self.trainer(
            model,
            args,
            method=method,
            train_dataset=rows[0],
            upper_dataset=rows[1],
            eval_dataset=rows[2],
            **{name: value for name, value in options.items() if value is not None},
        )
        self.layers = compute_once(trainer, dropout=self.frozen_dropout)
        return trainer


def rows_of_phases(trainer: BilevelTrainer) -> tuple[int, int]:
    """The rows of the first phase of ``trainer`` and of the second, which it may pack."""
    lower = len(trainer.train_dataset)
    if trainer.upper is None:
        return lower, lower
    if trainer.parent() is Trainer:
        return lower, len(trainer.all_rows())
    return lower, len(trainer.retraining(trainer.args).train_dataset)


class OneLevel(Method):
    """The variables of both levels of ``method`` in one level, on all rows.

    The ablation that shows whether two levels are what helps.
    """

    def __init__(self, method: Method) -> None:
        self.method, self.tags = method, method.tags
        self.defaults = {k: v for k, v in method.defaults.items() if k != "hypergradient"}
        for name in ("adapter", "rows", "all_rows", "prepare", "after_upper_step", "finish"):
            setattr(self, name, getattr(method, name))

    def read_rows(self, model: Any, rows: Any, collate: Any) -> None:
        """As ``method``'s; the class has it, since a trainer asks the class."""
        self.method.read_rows(model, rows, collate)

    def lower(self, model: Any, task_loss: TaskLoss) -> Problem:
        """The lower level's loss over the variables of both levels."""
        return _Together(self.method.lower(model, task_loss), self.method.upper(model, task_loss))


class _Together(Problem):
    def __init__(self, lower: Problem, upper: Problem) -> None:
        self.lower = lower
        pairs = [(n, x) for each in (lower, upper) for n, x in zip(each.names, each.variables)]
        super().__init__(pairs, name=f"{lower.name} in one level")

    def loss(self, batch: Any) -> Any:
        return self.lower.loss(batch)


class _Clock(TrainerCallback):
    """The time at the end of each step, beside the passes that ``counter`` has counted."""

    def __init__(self, counter: PassCounter) -> None:
        self.counter, self.ends = counter, list[tuple[float, float]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append((time.perf_counter(), self.counter.passes))

    def seconds_a_pass(self) -> float:
        """Without the first step, which allocates."""
        (begin, first), *_, (end, last) = self.ends
        return (end - begin) / (last - first)


def _adapted(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config)


def peak_memory() -> Callable[[], float]:
    """A function that returns the peak memory since now in MB: the device's, or the process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 1e6
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

    def peak() -> float:
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1e3
        return float("nan")

    return peak
