"""`BilevelTrainer`: two levels driven by `transformers.Trainer`."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hyperopt_peft.core.labels import (
    ENTRIES,
    ITEMS,
    MICRO_BATCHES,
    WEIGHT,
    RowLosses,
    model_reads,
)
from hyperopt_peft.core.prior import GaussianPrior
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.trainer import checks, data, optimizer, phases
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.callback import BilevelCallback, Point
from hyperopt_peft.trainer.internals import metrics_restored, packed_with, prepared
from hyperopt_peft.trainer.logs import add_numbers, add_to_card, shorten
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.over import CombinedTrainer, LowerStep, combined
from hyperopt_peft.trainer.own_loss import BATCHES, Rule, check_known, require_read
from hyperopt_peft.trainer.phases import Phase
from hyperopt_peft.trainer.saved import Original, check_saved
from hyperopt_peft.trainer.splits import reads_of
from hyperopt_peft.trainer.step import Accumulated, OptimizerStep
from hyperopt_peft.trainer.tags import keep_tags, marks, without
from hyperopt_peft.trainer.task_loss import LossRule
from hyperopt_peft.trainer.upper_batches import upper_batches
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import reshard
from hyperopt_peft.utils.models import keep_differentiable, require_unwrapped, uncounted

#: A level, or a function that makes one for a trainer and reads its ``task_loss``.
LevelLike = Problem | Callable[["BilevelTrainer"], Problem]
SETTINGS = "bilevel_settings.json"


class BilevelTrainer(CombinedTrainer):
    """`transformers.Trainer` for a lower and an upper level over one model.

    Every optimizer step moves the lower level. Each ``lower_steps``-th step also moves the upper
    level, by the hypergradient at the same point, on the step's lower batch (all micro-batches, all
    processes) and the upper level's next one, by default as large. One optimizer holds both levels,
    in separate parameter groups.

    Training uses the losses of the levels, evaluation the loss of the model. A level that is a
    function of the trainer can read ``trainer.task_loss``, the loss that the Trainer itself would
    train. Other losses are averaged over the micro-batches of a step. docs/training-reference.md
    lists the logged numbers and the refusals; docs/distributed.md is about several processes.

    Args:
        model: the model that the Trainer saves, evaluates and moves to its device; or its name, if
            the trainer given to `bilevel` loads models by name.
        args: the settings; the trainer copies them and adds the method's defaults.
        method: makes both levels, and the plain model of the second phase; see `Method`. A
            baseline has one phase. Without method and levels, one level trains all trainable
            parameters.
        lower: the lower level in place of a method, without data and optimizer.
        upper: the upper level, likewise; None trains the lower level alone.
        train_dataset: the lower level's examples. Without ``upper_dataset`` the upper level gets
            ``args.upper_fraction`` of them.
        upper_dataset: the upper level's examples, never ``eval_dataset``.
        row_losses: where the loss is the user's own, a function of (model, batch) that returns it
            by row: ℓ ``(n,)``, whose mean is the loss, or ℓ and c, where Σ ℓ/Σ c is. Methods that
            weight rows need it. Where they read it, it is compared with ``compute_loss`` on the
            first five batches.
        trainer: further arguments of `transformers.Trainer`, or of the trainer given to `bilevel`.
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
    #: The columns that the model takes, if tags pass beside them; else None.
    model_columns: set[str] | None = None
    #: The number of calls of `task_loss`.
    calls = 0
    # As of `transformers.Trainer`, which sets them.
    train_dataset: Any = None
    eval_dataset: Any = None

    def __init__(
        self,
        model: nn.Module | str,
        args: BilevelTrainingArguments,
        *,
        method: Method | Phase | None = None,
        lower: LevelLike | None = None,
        upper: LevelLike | None = None,
        train_dataset: Any,
        upper_dataset: Any = None,
        row_losses: RowLosses | None = None,
        **trainer: Any,
    ) -> None:
        require_unwrapped(model)
        args = self.Arguments.of(args)
        #: The columns in which rows must differ to be different rows; None for all.
        self.row_columns = reads_of(model, args)
        #: The further arguments of the second phase's trainer.
        self.options_again = phases.options_again(trainer)
        evaluation = trainer.pop("eval_dataset", None)
        if not isinstance(method, Phase):
            rows = train_dataset, upper_dataset
            if upper_dataset is not None:  # before rows are numbered or joined
                data.require_apart(*rows, evaluation, self.row_columns)
            given = (args, trainer, row_losses)
            method, args = phases.first_phase(method, lower, upper, rows, *given)
            train_dataset, upper_dataset = method.rows_of_levels
        args = args.with_defaults({})
        self.phase, self.method = method, method.method
        self.tags, self.passes = method.tags, method.passes  # see `Phase`
        #: The trainer of the second phase; None before that begins.
        self.retrainer: Any = None
        #: Whether the last phase has ended, and the adapter is not yet saved and checked.
        self.trained = False
        self.skipped = 0
        self._unchecked = BATCHES
        #: The user's rule for the losses of rows, which methods have too; None without one.
        self.row_losses = method.row_losses and Rule(method.row_losses, self.tags)
        if self.method is not None:
            vars(self.method)["row_losses"] = self.row_losses  # also of a frozen dataclass
        self._unprepared: list[Tensor] = []
        self._replicated: list[dict[str, Any]] = []
        checks.check_arguments(self, model, args, trainer)
        if self.phase.reads_trainer:
            for rows in (train_dataset, upper_dataset, evaluation):
                checks.check_rows(model, rows, trainer)
        if self.parent() is not Trainer:
            data.require_same_layout(train_dataset, upper_dataset)
        train_dataset, upper_dataset = data.data_of_levels(
            train_dataset, upper_dataset, args, method.upper is not None, self.row_columns
        )
        self.callback = BilevelCallback(self)
        with packed_with(self.tags):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                # The parent prepares the upper level's data as it prepares evaluation data.
                eval_dataset=data.with_upper(evaluation, upper_dataset, args),
                **trainer,
            )
        # Before the user's, behind the one that decides; some parents' constructors take none.
        self.callback_handler.callbacks[1:1] = [self.callback, self.passes]
        shorten(self)
        keep_differentiable(self.model)
        prepared = data.without_upper(self.eval_dataset, evaluation, upper_dataset)
        self.eval_dataset, self.upper_dataset = prepared
        if self.tags:
            keep_tags(self)
        phases.show_rows(self)
        data.warn_of_repeated_rows(self.train_dataset, args)
        self.loss_rule = LossRule.of(self, stock=BilevelTrainer)
        self.original = Original(self.model)
        self.lower: Problem = phases.level_of(self, self.phase.lower)
        self.upper: Problem | None = phases.level_of(self, self.phase.upper)
        self.estimator = args.estimator()
        checks.check_levels(self)
        check_known(self)
        self.original.require_saved(self)
        self.upper_batches = upper_batches(self)
        self.current_step = self._step_by(self.optimizer or optimizer.new_optimizer(self))

    @property
    def levels(self) -> list[Problem]:
        """The lower level, then the upper level if there is one."""
        return [self.lower] if self.upper is None else [self.lower, self.upper]

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """The levels' variables and the centres of their priors, by level and name."""
        named: list[tuple[str, Tensor]] = []
        for key, level in zip(("lower", "upper"), self.levels):
            named += [(f"{key}.{n}", x) for n, x in zip(level.names, level.variables)]
            if isinstance(level.prior, GaussianPrior):
                named += [(f"{key} prior.{n}", x) for n, x in zip(level.names, level.prior.start)]
        return named

    # Phases

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`; ``True`` resumes from the last complete checkpoint.

        With a method, this runs the search and the second phase, and returns the result of the last
        one. A resumed run equals the uninterrupted run bit for bit, but for docs/distributed.md.

        Raises:
            ProblemError: there is no complete checkpoint, or it is damaged or has other settings or
                data; the run has fewer steps than ``lower_steps``; the collator cannot batch the
                examples; at a level's first step the loss is no scalar or ignores a variable.
            NonFiniteError: a loss, gradient or curvature is not finite, and ``args.non_finite`` is
                ``"raise"``. The message names step and batch.
        """
        self.passes.begin()
        return phases.run(self, resume_from_checkpoint, *args, **kwargs)

    def train_phase(self, point: Point, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run this trainer's phase from ``point``; ``settings`` are those of `settings_of`."""
        self.skipped = 0
        try:
            with self.callback.run(point, settings):
                distributed.broadcast([x for _, x in self.named_tensors()], self.args.device)
                folder = None if point is None else str(point[0])
                return super().train(folder, *args, **kwargs)
        finally:
            self.passes.end()
            if self.upper_batches is not None:
                self.upper_batches.close()

    @property
    def has_second_phase(self) -> bool:
        """Whether a second phase, training of the lower level alone, follows the search."""
        return self.method is not None and self.upper is not None and self.args.retrain != "none"

    def all_rows(self) -> Any:
        """The rows of the second phase, as the method makes them from both levels' rows."""
        assert self.method is not None
        return self.method.all_rows(*self.phase.rows)

    def retraining(self, args: Any, search: Mapping[str, Any]) -> Any:
        """The trainer of the second phase, on this model; ``search`` has this one's settings."""
        # A copy, since a subclass's constructor may have set what its loss reads.
        second = copy(self)
        if self.model_columns is not None:  # tags had turned it off
            args.remove_unused_columns = True
        with phases.as_prepared(self.model):
            BilevelTrainer.__init__(
                second,
                self.model,
                args,
                method=replace(self.phase, lower=phases.lower_of, upper=None, search=search),
                train_dataset=self.all_rows(),
                **{"processing_class": self.processing_class, **self.options_again},
            )
        return second

    def end_training(self) -> None:
        """End the process group: the last line of a script, which threads of gloo would abort."""
        # DDP goes first: if it held the last reference to the group, the threads would wait for it.
        for trainer in filter(None, (self.retrainer, self)):
            trainer.model_wrapped = trainer.model
            trainer.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()

    # The loss

    def task_loss(self, batch: Any) -> Tensor:
        """The Trainer's loss of a micro-batch, a scalar.

        With the entries of `core.labels`, its mean over a step's micro-batches and processes is the
        mean over all labels of the step.
        """
        self.calls += 1
        inputs = without(batch, self.tags)
        weight, items, n = (inputs.pop(entry, None) for entry in (WEIGHT, ITEMS, MICRO_BATCHES))
        if n is not None:  # TRL divides a mixture of experts' auxiliary loss by this attribute
            self.current_gradient_accumulation_steps = n
        with model_reads(batch):
            loss: Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=items)
        if n is not None:
            # In 64 bits the later division by n gives back exactly the loss.
            loss = (loss if loss.is_mps else loss.double()) * n
        elif weight is not None:
            loss = loss * weight.to(loss.dtype)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As `transformers.Trainer.compute_loss`, corrected for evaluation by several processes.

        Given a count of labels, the Trainer multiplies the loss by the number of processes, even if
        the model ignores the count and averages itself. Such a model gets no count.
        """
        compute = super().compute_loss
        items = num_items_in_batch
        if items is not None and distributed.world_size() > 1:
            of_count = lambda n: compute(model, deepcopy(dict(inputs)), num_items_in_batch=n)  # noqa: E731
            if self.loss_rule.ignores_count(self.model, of_count, "model"):
                items = None
        return compute(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.prediction_step`, without tags."""
        inputs = without(inputs, self.tags) if self.tags else inputs
        return super().prediction_step(model, inputs, *args, **kwargs)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A context for evaluations of the loss that train nothing, uncounted and not logged."""
        with metrics_restored(self), uncounted(), self.compute_loss_context_manager():
            yield

    def with_entries(self, batches: Sequence[Any]) -> list[Any]:
        """A step's micro-batches, of either level, with the entries of `core.labels`."""
        samples = list(batches)
        # No samples: the run resumed at the end of an epoch. Levels' own losses read no entries.
        if not samples or not self.phase.reads_trainer:
            return samples
        read = [without(batch, self.tags) for batch in samples] if self.tags else samples
        loss = lambda batch: self.task_loss(prepared(self, batch))  # noqa: E731
        entries = self.loss_rule.entries(read, self.model, loss)
        return [{**b, **e} if e else b for b, e in zip(samples, entries, strict=True)]

    # A step

    def adopt_prepared_parameters(self) -> None:
        """Replace the levels' variables by the optimizer's, which FSDP2 has made shards."""
        params = [x for group in self.optimizer.param_groups for x in group["params"]]
        prepared = dict(zip(map(id, self._unprepared), params, strict=True))
        for level in self.levels:
            level.variables = tuple(prepared[id(variable)] for variable in level.variables)
        self.current_step = self._step_by(self.optimizer)

    def _step_by(self, both: Any) -> OptimizerStep:
        """The step over the levels' current variables; the optimizer ``both`` holds them all."""
        bilevel = None
        if self.upper is not None:
            lower = Accumulated(self.lower, both, self.args.max_grad_norm or None)
            upper = Accumulated(self.upper, calls=lambda: self.calls)
            options = {"seed": self.args.seed, "uncounted": uncounted}
            bilevel = BilevelStep(upper, lower, self.estimator, **options)
        return OptimizerStep(
            self.lower,
            bilevel,
            args=self.args,
            optimizer=both,
            accelerator=self.accelerator,
            upper_batches=self.upper_batches,
            with_entries=self.with_entries,
            prepare=partial(prepared, self),
            autocast=self.compute_loss_context_manager,
        )

    def begin_step(self) -> None:
        """Begin an optimizer step; the callback calls this before the first micro-batch."""
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
        with data.collating("train_dataset"):
            batches = list(islice(self.callback.batches or epoch_iterator, num_batches))
        return self.with_entries(batches), None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one micro-batch; the call for the last one computes the step's gradients.

        A parent's override runs around `lower_step`; what it leaves of the gradients is clipped.
        """
        if not self.is_in_train:
            raise ProblemError(
                "training_step: a step of two levels is a part of train(); call train(), or "
                "hyperopt_peft.hypergradient for one hypergradient"
            )
        # The parent's step sees the batch as the parent prepared it.
        batch = without(inputs, (*self.tags, *ENTRIES)) if isinstance(inputs, Mapping) else inputs
        self._micro_batch = inputs
        self._seen: list[Any] = []
        step, before = self.current_step, marks(batch)
        passes = super().training_step if isinstance(self, LowerStep) else self.lower_step
        loss: Tensor = passes(model, batch, *args, **kwargs)
        if self._seen != [before]:
            raise ProblemError(
                f"training_step: {self.parent().__name__} must call super().training_step once, "
                "with the batch unchanged, as upper batches skip it; change rows in the collator"
            )
        if step.complete:
            try:
                with metrics_restored(self):
                    step.set_gradients(self.state.global_step + 1)
                step.withhold_gradients()
            except NonFiniteError as error:
                step.clear_gradients()
                self.handle_non_finite(error)
        return loss

    def lower_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The passes of `training_step`: the loss of a micro-batch, differentiated."""
        self._seen.append(marks(inputs))
        self._set_training_mode(model)
        step, calls, rule = self.current_step, self.calls, self.row_losses
        reads = rule and rule.reads
        loss = step.evaluate(self._micro_batch)
        if self._unchecked and calls == self.calls:
            require_read(self, step.micro[-1].batch, rows_read=bool(rule and rule.reads != reads))
        self._unchecked = max(0, self._unchecked - 1)
        return loss

    def handle_non_finite(self, error: NonFiniteError) -> None:
        """Count the step as skipped, or raise."""
        if self.args.non_finite == "skip":
            self.skipped += 1
            return
        step, number, epoch = self.current_step, self.state.global_step + 1, self.state.epoch or 0
        raise NonFiniteError(
            f"step {number} (epoch {epoch:.2f}, {step.count} micro-batches): {error}; "
            f"{step.advice()}"
        ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `transformers.Trainer.log`, with the numbers of the levels, passes and seconds."""
        add_numbers(self, logs)
        super().log(logs, start_time)

    # Optimizer, schedule and files

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer ``args.optim`` over both levels, each in parameter groups of its own."""
        if self.is_fsdp_enabled:  # an evaluation replaces the shards by full parameters
            reshard(self.model)
        if self.optimizer is None:
            optimizer.create(self, super().create_optimizer)
        self._replicated = optimizer.take_replicated(self)
        groups = [*self.optimizer.param_groups, *self._replicated]
        self._unprepared = [parameter for group in groups for parameter in group["params"]]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `transformers.Trainer.create_scheduler`; refuses a run without an upper step."""
        self.require_upper_step(num_training_steps)
        while self._replicated:  # the prepared optimizer has the others already
            self.optimizer.add_param_group(self._replicated.pop(0))
        return super().create_scheduler(num_training_steps, optimizer)

    def require_upper_step(self, steps: int) -> None:
        """Raise ProblemError if a run of ``steps`` lower steps has no upper step."""
        if self.upper is not None and steps < self.args.lower_steps:
            raise ProblemError(
                f"lower_steps: {self.args.lower_steps} leaves no upper step in a run of "
                f"{steps} steps of {self.args.gradient_accumulation_steps} micro-batches; train "
                "for longer, or lower lower_steps or gradient_accumulation_steps"
            )

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.save_model`, with the settings; a checkpoint has the levels.

        The first call after the training raises ProblemError if PEFT loads another model.
        """
        folder = Path(output_dir or self.args.output_dir)
        name = f"{checkpoint.PREFIX}{self.state.global_step}"
        if self.is_in_train and folder == Path(self.args.output_dir or "") / name:
            self.callback.write(folder)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(json.dumps(self.args.bilevel_settings(), indent=1))
        adapter = hasattr(self.model, "peft_config") and not self.is_fsdp_enabled
        check = adapter and self.trained and self.method is not None and self.args.should_save
        if check:
            self.trained = False
            self.original.require_plain(self.model, type(self.method).__name__)
        super().save_model(output_dir, *args, **kwargs)
        if self.callback.writing is not None:  # delete no older checkpoint before this is complete
            self.args.save_total_limit = None
        if check:
            check_saved(self.model, folder, type(self.method).__name__)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible, since a search makes a new model for each trial."""
        raise ProblemError(
            "hyperparameter_search: the levels own the tensors of one model; compare rates with "
            "compare_methods and a Choice, or learn the setting as an upper variable"
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.create_model_card`, with the bilevel settings."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(self)


def bilevel(trainer: Any) -> type[BilevelTrainer]:
    """`BilevelTrainer` over another `transformers.Trainer` subclass, such as TRL's SFTTrainer.

    Equal calls return the same class. Both levels train the loss of ``trainer``, on data that
    ``trainer`` prepares. The attribute ``Arguments`` combines the arguments of both classes, with
    the defaults of ``trainer``; an arguments object of ``trainer`` is accepted too. Its
    ``training_step`` runs around the lower level's passes.

    Raises:
        ProblemError: ``trainer`` is not a Trainer, or generates its batches in each step.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> bilevel(Seq2SeqTrainer).Arguments("outputs", report_to="none").predict_with_generate
        False
    """
    made: type[BilevelTrainer] = combined(BilevelTrainer, trainer)
    return made
