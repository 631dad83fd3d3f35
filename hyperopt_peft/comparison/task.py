"""One run of a comparison: a method, a seed and rates; from the data to a score."""

from __future__ import annotations

import copy
import functools
import gc
import math
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import set_seed

from hyperopt_peft.comparison import influence
from hyperopt_peft.comparison.ablations import OneLevel, Projects
from hyperopt_peft.comparison.budget import Budget, peak_memory
from hyperopt_peft.comparison.rows import Rows
from hyperopt_peft.comparison.upper import UpperLevel, arguments_of
from hyperopt_peft.core.labels import RowLosses
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.heads.frozen_layers import compute_once
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.contents import contents_of
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.passes import passes_of_a_cycle
from hyperopt_peft.trainer.quiet import QUIET, no_bars
from hyperopt_peft.trainer.splits import shared_rows
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.models import evaluating

#: A method as it is; its upper variables frozen; or all of its variables in one level on all rows.
Kind = Literal["method", "frozen", "one level"]
#: What each is called, after the method's name.
ABLATIONS: dict[Kind, str] = {
    "method": "",
    "frozen": ", upper level frozen",
    "one level": ", one level",
}

#: Arguments of every run; a user's other values, which would change its result, are refused.
FIXED = {"dataloader_drop_last": False, "eval_strategy": "no", "load_best_model_at_end": False}
#: The rows that an evaluation is tried on.
SOME = 64
#: The test rows whose logits a training must change, and the logits that are read of a batch: a
#: language model has millions.
ROWS, ENTRIES = 8, 100_000


@dataclass(frozen=True)
class Run:
    """What distinguishes a run from the others of a comparison.

    Attributes:
        method: its name.
        kind: the method, or one of its two ablations.
        seed: of the held-out rows, the split, the start and the order.
        rate: the peak learning rate of the lower level.
        upper_rate: that of the upper level; None is that of the arguments.
        passes: the budget, which the learning rates follow; 0 of heads, which are solved.
        stop: the passes of its last phase after which the run ends before its budget.
        split: which held-out part of the seed's rows scores the run, which trains without it; None
            is a reported run, which the test rows score.
        points: the passes after which a development run is scored, its end included.
    """

    method: str
    kind: Kind
    seed: int
    rate: float
    upper_rate: float | None = None
    passes: float = 0.0
    stop: float | None = None
    split: int | None = None
    points: tuple[float, ...] = ()

    def __str__(self) -> str:
        upper = "" if self.upper_rate is None else f", upper rate {self.upper_rate:g}"
        return f"{self.method}{ABLATIONS[self.kind]}, seed {self.seed}, rate {self.rate:g}{upper}"


@dataclass(frozen=True)
class Price:
    """What a run takes, by two cycles of its training.

    Attributes:
        phases: of the training; none of heads, and where a loss is not finite.
        every, passes: the lower steps of a cycle, in each phase, and the passes of all phases.
        seconds: about the time of the whole run.

    Example:
        >>> price = Price(phases=1, every=4, passes=7.0, seconds=2.0)
        >>> price.steps(20), price.least(10)
        (8, 21.0)
    """

    phases: int
    every: int = 1
    passes: float = 0.0
    seconds: float = 0.0

    def steps(self, passes: float) -> int:
        """About the lower steps of a phase with ``passes``."""
        return int(passes // self.passes) * self.every

    def least(self, steps: int) -> float:
        """The passes that give each phase so many steps."""
        return math.ceil(steps / self.every) * self.passes


@dataclass
class Task:
    """What all runs of a comparison share; it is pickled for other processes.

    Attributes are arguments of `compare_methods`, and ``layers``, how many layers of the last model
    are computed once, in words.
    """

    methods: Mapping[str, Method]
    base_model: Callable[[], Any]
    adapter: Any
    args: BilevelTrainingArguments
    data: Rows
    metric: str
    trainer: type[BilevelTrainer] = BilevelTrainer
    options: Mapping[str, Any] = field(default_factory=dict)
    frozen_dropout: bool = False
    layers: str = ""

    def __post_init__(self) -> None:
        self.args = self.trainer.Arguments.of(self.args)
        again = cast(Mapping[str, Any], self.args.retrain_arguments or {})
        for place, values in {"": vars(self.args), "retrain_arguments: ": again}.items():
            for name, value in FIXED.items():
                if values.get(name, value) != value:
                    raise ProblemError(
                        f"{place}{name}: a run of a comparison reads all of its rows, and no test "
                        "row chooses where it ends; leave it out"
                    )

    @no_bars()
    def run(self, run: Run) -> dict[str, Any]:
        """Train and score; the entries of ``run`` with metrics, passes, seconds and steps.

        There are no metrics where a loss is not finite.

        Raises:
            ProblemError: the steps send no row through the model; as `BilevelTrainer`.
        """
        return self._trained(run, Budget(run.passes, run.stop, run.points))

    def _trained(self, run: Run, budget: Budget, short: bool = False) -> dict[str, Any]:
        """Train and score; if ``short``, about two cycles and a few rows, after checks."""
        freeze_imports()
        begin = time.perf_counter()
        metrics: dict[str, float] = {}
        moved: influence.Influence = {}
        with tempfile.TemporaryDirectory(prefix="comparison-") as folder:
            trainer = self.make(run, self.data.of(run.seed, run.split), folder, budget)
            budget.begin(trainer, self.unit)
            if short:
                self._require_apart(trainer, run)
                a_cycle = passes_of_a_cycle(trainer) + trainer.args.lower_steps * budget.again
                budget.passes = max(6.0, 2 * budget.a_step * a_cycle)
            before = logits_of(trainer)
            peak, upper = peak_memory(), UpperLevel(trainer)
            with suppress(NonFiniteError):  # such as a rate that is too high; it has no score
                trainer.train()
                check_trained(trainer, run.method, before)
                last = trainer.retrainer or trainer
                scored = last.eval_dataset
                if short:  # of every class, if sorted
                    scored = scored.select(range(0, len(scored), -(-len(scored) // SOME)))
                if run.split is None and not short:
                    metrics, moved = influence.evaluate(last, scored)
                else:
                    metrics = last.evaluate(scored)
                self.require_metric(metrics)
        steps = [x.state.global_step for x in (trainer, trainer.retrainer) if x is not None]
        more: dict[str, Any] = {"memory": peak(), "seconds": time.perf_counter() - begin}
        spent = dict(budget.spent)
        if run.split is not None:
            curve = [*budget.curve, (run.passes, metrics)]
            more["curve"] = [(point, numbers(each)) for point, each in curve]
            rows = len(more["curve"]) * len(trainer.eval_dataset)
            spent["held-out scores"] = rows / self.unit / 3  # a forward is a third of a pass
        else:
            more["influence"] = moved
        return self.line(run, metrics, steps=steps, spent=spent, **more, **upper.entries)

    @property
    def unit(self) -> int:
        """The rows of a pass, for every method: those of a lower step by the user's arguments."""
        return int(self.args.train_batch_size * self.args.gradient_accumulation_steps)

    @no_bars()
    def fingerprint(self) -> Any:
        """The contents of the model that ``base_model`` makes.

        Raises:
            ProblemError: the same model again and again.
            NoContentsError: as `contents_of`.
        """
        set_seed(0)
        model = self.base_model()
        alive = weakref.ref(model)
        contents = contents_of(model, "base_model", whole=False)
        del model
        gc.collect()
        if alive() is not None:
            raise ProblemError(
                "base_model: returns one model again and again, which each run would train "
                "further; let it make a new one"
            )
        return contents

    def line(self, run: Run, metrics: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The entries of ``run``."""
        return {**asdict(run), "metrics": numbers(metrics), "layers": self.layers, **more}

    @no_bars()
    def check(self, run: Run) -> Price:
        """Train ``run`` for two cycles: what all of its passes give, and take.

        What is wrong with a method so shows before any run.

        Raises:
            ProblemError: the metric is unknown; the method trains on test rows; as `run`.
        """
        budget = Budget(run.passes)
        result = self._trained(run, budget, short=True)
        every = budget.lower_steps or 1
        finite = [each for each in budget.cycles if each[0]]
        passes = sum(every * passes / steps for steps, passes in finite)
        more = run.passes + len(self.data.of(run.seed)[2]) / self.unit / 3
        more -= sum(result["spent"].values())
        seconds = result["seconds"] + more * budget.seconds / (budget.timed or math.inf)
        return Price(len(finite), every, passes, seconds)

    def _require_apart(self, trainer: BilevelTrainer, run: Run) -> None:
        """Raise ProblemError for test rows among the training rows."""
        test = self.data.of(run.seed, run.split)[2]
        for rows in (trainer.train_dataset, trainer.upper_dataset, trainer.all_rows()):
            alike = {*test.column_names} <= {*getattr(rows, "column_names", ())}
            if alike and (common := shared_rows(test, rows, self.data.reads)):
                raise ProblemError(
                    f"{run.method}: trains on {len(common)} of {len(test)} test rows; let rows "
                    "and all_rows return rows of train_dataset alone"
                )

    def require_metric(self, metrics: Mapping[str, Any]) -> None:
        """Raise ProblemError where ``metrics`` of an evaluation lack the score."""
        if f"eval_{self.metric}" not in metrics:
            known = ", ".join(sorted(metrics)).replace("eval_", "")
            raise ProblemError(
                f"metric: {self.metric} is none of {known}; give compute_metrics another"
            )

    @property
    def rule(self) -> RowLosses | None:
        """The user's ``row_losses``."""
        return self.options.get("row_losses")

    def method_of(self, run: Run) -> Method:
        """A method of its own for ``run``."""
        method = copy.deepcopy(self.methods[run.method])
        return OneLevel(method) if run.kind == "one level" else method

    def options_of_a_run(self) -> dict[str, Any]:
        """Copies of the options, so that no run reads what a callback, say, kept of another."""
        with suppress(Exception):  # of what cannot be copied, such as a lock
            return copy.deepcopy(dict(self.options))
        return dict(self.options)

    def make(self, run: Run, rows: Sequence[Any], folder: str, *callbacks: Any) -> BilevelTrainer:
        """A trainer of ``run``, which writes and shows nothing; ``callbacks`` end its phases."""
        method = self.method_of(run)
        args = arguments_of(method, self.args, self.rule)  # for what the run leaves open
        method.defaults = {}
        steps = max(2, math.ceil(run.passes)) * self.unit  # a row at least
        changes = {
            **{**QUIET, **FIXED, "output_dir": folder, "disable_tqdm": True},
            **{"seed": run.seed, "data_seed": None, "learning_rate": run.rate, "max_steps": steps},
            "retrain_arguments": {**without_sizes(args), "max_steps": steps},
        }
        upper_rate = 0.0 if run.kind == "frozen" else run.upper_rate
        if upper_rate is not None:
            changes["upper_learning_rate"] = upper_rate
        args.__dict__.update(changes)
        set_seed(run.seed)
        model, options = self.base_model(), self.options_of_a_run()
        options["callbacks"] = [*(options.get("callbacks") or ()), *callbacks]
        set_seed(run.seed)  # which base_model may have changed
        if self.adapter is not None:
            options["peft_config"] = None
            model = get_peft_model(model, method.adapter(copy.deepcopy(self.adapter)))
        trainer = self.trainer(
            model,
            args,
            method=method,
            train_dataset=rows[0],
            upper_dataset=rows[1],
            eval_dataset=rows[2],
            **{name: value for name, value in options.items() if value is not None},
        )
        if run.kind == "one level":
            trainer.add_callback(Projects(method))
        self.layers = compute_once(trainer, dropout=self.frozen_dropout)
        return trainer


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scores in ``metrics``; without times."""
    times = "eval_runtime", "_per_second"
    return {k: x for k, x in metrics.items() if k.startswith("eval_") and not k.endswith(times)}


@functools.cache
def freeze_imports() -> None:
    """Every training collects garbage twice; what was imported, most of its time, is none."""
    gc.collect()
    gc.freeze()


def without_sizes(args: Any) -> dict[str, Any]:
    """The ``retrain_arguments`` of ``args``, without rate, length and batch."""
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    decided = batch | {"learning_rate", "max_steps", "num_train_epochs"}
    return {name: x for name, x in (args.retrain_arguments or {}).items() if name not in decided}


def logits_of(trainer: Any) -> Tensor:
    """Logits of a few test rows, by the model of the last phase of ``trainer``."""
    model, rows = (trainer.retrainer or trainer).model, trainer.eval_dataset
    loader = trainer.get_eval_dataloader(rows.select(range(min(len(rows), ROWS))))
    with torch.no_grad(), evaluating(model):
        outputs = [model(**without(batch, trainer.tags)) for batch in loader]
    # TRL's SFTTrainer before 1.15 has the loss alone.
    read = [x.loss if x.logits is None else x.logits for x in outputs]
    return torch.cat([each.flatten()[:ENTRIES] for each in read]).float()


def check_trained(trainer: Any, name: str, before: Tensor) -> None:
    """Raise ProblemError where no logit has changed, or the method ``name`` left no plain model.

    ``before`` are the logits before the training.
    """
    if torch.equal(logits_of(trainer), before):
        raise ProblemError(
            f"{name}: the training has changed no logit; let a loss read its variables, and "
            "finish keep what they learned"
        )
    for place, module in (trainer.retrainer or trainer).model.named_modules():
        if hasattr(module, "parametrizations"):
            raise ProblemError(
                f"{name}: finish leaves a parametrisation at {place}, without which the saved "
                "adapter is another one; remove it by "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
