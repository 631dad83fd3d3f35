"""`BilevelTrainer`: two levels driven by `transformers.Trainer`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from hyperopt_peft.core.labels import NO_LABELS, scored_labels
from hyperopt_peft.core.prior import GaussianPrior
from hyperopt_peft.core.problem import Problem, devices_of
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.trainer import checks
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.callback import BilevelCallback
from hyperopt_peft.trainer.data import (
    Endless,
    Reads,
    collating,
    data_of_levels,
    reads_of,
    require_apart,
    require_same_layout,
    warn_of_repeated_rows,
    with_upper,
    without_upper,
)
from hyperopt_peft.trainer.internals import counters_of, metrics_restored, packed_with
from hyperopt_peft.trainer.logs import shorten, upper_gap
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.optimizer import check_optimizers, params_of
from hyperopt_peft.trainer.over import loads_names
from hyperopt_peft.trainer.passes import PassCounter
from hyperopt_peft.trainer.phases import PhasesTrainer
from hyperopt_peft.trainer.step import Accumulated, OptimizerStep
from hyperopt_peft.trainer.tags import keep_tags
from hyperopt_peft.trainer.upper_batches import loader_of, upper_batches
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import keep_differentiable

#: A level, or a function that makes one for a finished trainer and reads its ``task_loss``.
LevelLike = Problem | Callable[["BilevelTrainer"], Problem]


class BilevelTrainer(PhasesTrainer):
    """`transformers.Trainer` for a lower and an upper level over one model.

    Every optimizer step moves the lower level. Each ``lower_steps``-th step also moves the upper
    level, by the hypergradient at the same point. It is computed on the step's lower batch (all
    micro-batches, all processes) and on the upper level's next batch. A small upper data set is one
    batch. One optimizer holds both levels, in separate parameter groups.

    Training uses the losses of the levels, evaluation the loss of the model. A level that is a
    function of the trainer can read ``trainer.task_loss``, the loss that the Trainer itself would
    train. Other losses are averaged over the micro-batches of a step. docs/training-reference.md
    lists the logged numbers and the refusals; docs/distributed.md is about several processes.

    Args:
        model: the model that the Trainer saves, evaluates and moves to its device; or its name, if
            the trainer that this is `over` loads models by name.
        args: the settings; the trainer copies them and adds the method's defaults.
        method: makes both levels, and the plain model of the second phase; see `Method`. A
            baseline has one phase. Without method and levels, one level trains all trainable
            parameters.
        lower: the lower level in place of a method, without data and optimizer.
        upper: the upper level, likewise; None trains the lower level alone.
        train_dataset: the lower level's examples. Without ``upper_dataset`` the upper level gets
            ``args.upper_fraction`` of them.
        upper_dataset: the upper level's examples, never ``eval_dataset``.
        trainer: further arguments of `transformers.Trainer`, or of the trainer that this is `over`.
            The second phase has copies of the ``callbacks`` in their initial state.

    Raises:
        ProblemError: levels share a tensor or have data or an optimizer of their own, data sets
            overlap, the optimizer does not hold exactly the levels' variables, or a setting would
            be ignored or make hypergradients wrong.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1)
        >>> class Fit(Problem):
        ...     def loss(self, batch):
        ...         return (model(batch["x"]) - batch["x"]).square().mean()
        >>> levels = {"lower": Fit([model.weight]), "upper": Fit([model.bias], name="Bias")}
        >>> args = BilevelTrainingArguments("outputs", use_cpu=True, remove_unused_columns=False)
        >>> rows = [{"x": torch.ones(1) * k} for k in range(4)]
        >>> data = {"train_dataset": rows[:3], "upper_dataset": rows[3:]}
        >>> [level.name for level in BilevelTrainer(model, **levels, args=args, **data).levels]
        ['Fit', 'Bias']
    """

    Arguments = BilevelTrainingArguments
    current_step: OptimizerStep
    _row_columns: Reads = None
    eval_dataset: Any
    current_flos: float

    def __init__(
        self,
        model: nn.Module | str,
        args: BilevelTrainingArguments,
        *,
        method: Method | None = None,
        lower: LevelLike | None = None,
        upper: LevelLike | None = None,
        train_dataset: Any,
        upper_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        checks.check_class(args, self.Arguments)
        self.passes = PassCounter()
        self._row_columns = reads_of(model, args)
        if upper_dataset is not None:  # before a method numbers, joins or repeats rows
            require_apart(
                train_dataset, upper_dataset, trainer.get("eval_dataset"), self._row_columns
            )
        if lower is None and upper is None:
            method = method or Method()
            self._set_up_method(model, args, method, train_dataset, upper_dataset, trainer)
            return
        if method is not None or lower is None:
            raise ProblemError("method: give a method, or the levels lower and upper, and not both")
        data = {"train_dataset": train_dataset, "upper_dataset": upper_dataset}
        self._set_up(model, args, lower=lower, upper=upper, **data, **trainer)

    def _set_up(
        self,
        model: nn.Module | str,
        args: BilevelTrainingArguments,
        *,
        lower: Any,
        upper: LevelLike | None,
        train_dataset: Any,
        upper_dataset: Any = None,
        callbacks: Sequence[Any] | None = None,
        **trainer: Any,
    ) -> None:
        """Initialise the trainer with two levels, or one."""
        args = args.with_defaults({})  # after a method's
        self.trainer_loss = _is_function(lower)
        checks.check_arguments(args, trainer)
        if not isinstance(model, nn.Module) and not loads_names(self.parent()):
            raise ProblemError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        evaluation = trainer.pop("eval_dataset", None)
        if self.trainer_loss:
            for data in (train_dataset, upper_dataset, evaluation):
                checks.check_rows(model, data, trainer)
        if self.parent() is not Trainer:
            require_same_layout(train_dataset, upper_dataset)
        train_dataset, upper_dataset = data_of_levels(
            train_dataset, upper_dataset, args, upper is not None, self._row_columns
        )
        self.skipped = 0
        self._callback = BilevelCallback(self)
        with packed_with(self.tags):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                # The parent prepares the upper level's data as it prepares evaluation data.
                eval_dataset=with_upper(evaluation, upper_dataset, args),
                callbacks=[self._callback, self.passes, *(callbacks or ())],
                **trainer,
            )
        shorten(self)
        keep_differentiable(self.model)
        self.upper_dataset = None
        if upper_dataset is not None:
            self.eval_dataset, self.upper_dataset = without_upper(self.eval_dataset, evaluation)
        if self.method is not None and self.tags:
            keep_tags(self, self.tags, type(self.method).__name__)
        self._show_rows()
        warn_of_repeated_rows(self.train_dataset, args)
        if not has_length(self.train_dataset):
            self.train_dataset = Endless(self.train_dataset)
        self._set_loss_rule()
        self.lower = _made(lower, self)
        self.upper = _made(upper, self)
        checks.check_levels(self.levels)
        if self.upper is not None and args.upper_prior is not None:
            if self.upper.prior is not None:
                raise ProblemError(
                    f"upper_prior: the level {self.upper.name} has a prior; leave one of them out"
                )
            self.upper.prior = GaussianPrior(args.upper_prior, self.upper.variables)
        self.estimator = args.estimator()
        checks.check_layers(self.model, self.levels, self.estimator)
        checks.check_accelerator(self, self.levels, self.estimator)
        checks.check_router_loss(self, self.levels)
        check_optimizers("optimizers", self.optimizer, self.lr_scheduler, self.levels)
        loader_of(self, self.train_dataset, "train_dataset")  # refuses what the model cannot read
        self.upper_batches = None
        if self.upper is not None:
            loader = loader_of(self, self.upper_dataset, "upper_dataset")
            self.upper_batches = upper_batches(self.upper_dataset, loader, args)
        self._set_step(self.optimizer or self._new_optimizer())

    def adopt_prepared_parameters(self) -> None:
        """Replace the levels' variables by the optimizer's, which FSDP2 has made shards."""
        prepared = dict(zip(map(id, self._unprepared), params_of(self.optimizer), strict=True))
        for level in self.levels:
            level.variables = tuple(prepared[id(variable)] for variable in level.variables)
        self._set_step(self.optimizer)

    def begin_step(self) -> None:
        """Begin an optimizer step; the callback calls this before the first micro-batch."""
        self._counters = self.current_flos, self.state.num_input_tokens_seen, counters_of(self)
        self._set_training_mode(self.model)
        with metrics_restored(self):
            count, number = self.current_gradient_accumulation_steps, self.state.global_step + 1
            self.current_step.begin(count, number)

    def _set_training_mode(self, model: nn.Module) -> None:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The next step's micro-batches with the entries of `core.labels`; none after the end."""
        if self.control.should_training_stop:
            return [], None
        with collating("train_dataset"):
            batches = list(islice(epoch_iterator, num_batches))
        return self._with_entries(batches), None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one micro-batch; the call for the last one computes the step's gradients.

        Each ``.grad`` is set by `BilevelCallback.on_pre_optimizer_step`, after the Trainer clips.
        """
        if not self.is_in_train:
            raise ProblemError(
                "training_step: a step of two levels is a part of train(); call train(), or "
                "hyperopt_peft.hypergradient for one hypergradient"
            )
        self._set_training_mode(model)
        step, calls = self.current_step, self.calls
        loss = step.evaluate(inputs)
        if calls == self.calls and not self._loss_checked:
            checks.check_unread(self, self.lower, step.micro[0].batch)
        self._loss_checked = True
        if step.complete:
            try:
                with metrics_restored(self):
                    step.set_gradients(self.state.global_step + 1)
                step.withhold_gradients()
            except NonFiniteError as error:
                step.clear_gradients()
                self._skip_or_stop(error)
        return loss

    def _skip_or_stop(self, error: NonFiniteError) -> None:
        """Count the step as skipped, or save the state before the step and raise."""
        if self.args.non_finite == "skip":
            self.skipped += 1
            return
        step, state = self.current_step, self.state
        self.current_flos, state.num_input_tokens_seen, counters = self._counters
        self.__dict__.update(counters)
        written = self._callback.save_before(step.micro[0].random_state)
        counts = [scored_labels(micro.batch, shifted=False) for micro in (*step.micro, *step.upper)]
        advice = NO_LABELS if any(count == 0 for count in counts) else NON_FINITE_ADVICE
        raise NonFiniteError(
            f"step {state.global_step + 1} (epoch {state.epoch or 0:.2f}, {step.count} "
            f"micro-batches): {error}; {advice}; {written}"
        ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `transformers.Trainer.log`, with the numbers of the levels, passes and seconds."""
        if "loss" in logs:
            means, last = self.current_step.log.read()
            logs |= {key: value for key, value in means.items() if key not in logs} | last
            if self.skipped:
                logs["skipped"] = self.skipped
            ratio = None if self.bilevel_step is None else self.bilevel_step.signal.read()
            if ratio is not None and ratio != float("inf"):
                logs["upper_snr"] = ratio
        if self.is_in_train and self.trainer_loss:
            logs |= upper_gap(logs, self.state.log_history)
        if self.is_in_train or "train_runtime" in logs:
            spent = distributed.averages(self.passes.read())  # a process has rows of its own
            # A resumed run adds two parts, whose last digit may be another.
            logs |= {name: round(value, 9) for name, value in spent.items()}
        super().log(logs, start_time)

    def end_training(self) -> None:
        """End the process group: the last line of a script.

        A process that exits while threads of gloo hold its tensors is aborted; the threads end
        with the process group. DDP is deleted first: if it held the last reference to the group,
        Python and the threads would wait for each other.
        """
        self.release_models()
        gc.collect()
        self.accelerator.end_training()

    def _set_step(self, optimizer: Any) -> None:
        """Make the step over the levels' current variables."""
        self.bilevel_step: BilevelStep | None = None
        if self.upper is not None:
            limit = self.args.max_grad_norm or None
            lower = Accumulated(self.lower, optimizer, limit)
            upper = Accumulated(self.upper, calls=lambda: self.calls)
            options = {"seed": self.args.seed, "uncounted": self.passes.paused}
            self.bilevel_step = BilevelStep(upper, lower, self.estimator, **options)
        self.devices = devices_of(*self.levels)
        self.current_step = OptimizerStep(
            self.lower,
            self.bilevel_step,
            args=self.args,
            optimizer=optimizer,
            accelerator=self.accelerator,
            upper_batches=self.upper_batches,
            with_entries=self._with_entries,
            autocast=self.compute_loss_context_manager,
        )


def bilevel(trainer: Any) -> type[BilevelTrainer]:
    """`BilevelTrainer` over another trainer, such as TRL's SFTTrainer; see `BilevelTrainer.over`.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> bilevel(Seq2SeqTrainer).Arguments("outputs", report_to="none").predict_with_generate
        False
    """
    return BilevelTrainer.over(trainer)


def _is_function(level: Any) -> bool:
    return callable(level) and not isinstance(level, Problem | nn.Module | type)


def _made(level: Any, trainer: BilevelTrainer) -> Any:
    return level(trainer) if _is_function(level) else level
