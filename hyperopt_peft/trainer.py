"""`BilevelTrainer`: two levels driven by `transformers.Trainer`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from hyperopt_peft import checkpoint, processes, versions
from hyperopt_peft.accelerator import check_accelerator
from hyperopt_peft.errors import NON_FINITE_ADVICE, NonFiniteError, ProblemError
from hyperopt_peft.hypergradients.estimate import check_estimator, estimate, like
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.purity import Copies
from hyperopt_peft.micro_batches import Accumulated, MicroBatch
from hyperopt_peft.problem import Problem, Step, devices_of, require_read
from hyperopt_peft.random_state import RandomState
from hyperopt_peft.sealed_trainer import GoOn, SealedTrainer
from hyperopt_peft.shards import full, reshard
from hyperopt_peft.snapshots import snapshot
from hyperopt_peft.trainer_checks import (
    check_arguments,
    check_batches,
    check_labels,
    check_levels,
    check_optimizer,
)
from hyperopt_peft.training_arguments import BilevelTrainingArguments
from hyperopt_peft.upper_data import (
    UpperBatches,
    collating,
    require_apart,
    require_examples,
    split_dataset,
)
from hyperopt_peft.upper_share import with_upper_share


class BilevelTrainer(SealedTrainer):
    """`transformers.Trainer` for a lower and an upper level over one model.

    Every optimizer step is one of the lower level; each ``lower_steps``-th moves the upper
    level too, by the hypergradient at the same point, on the step's own lower batch (all of its
    micro-batches and processes) and the upper level's next batch. One optimizer holds both, a
    group or more each, so schedules, checkpoints and resuming are the Trainer's own.

    The loss that is trained is the levels'; what is evaluated is the model's own.

    Several processes that share each batch train as one with all of it does: with DDP for every
    estimator, with accelerate's FSDP2 for those with first-order products, in float32. Under
    FSDP2 a loss must read its variables through the model.

    Args:
        model: what the Trainer saves, evaluates and moves to its device.
        lower: the lower level, without data and optimizer: the Trainer has them.
        upper: the upper level, likewise; None trains the lower level alone, as a baseline.
        args: the settings.
        train_dataset: the lower level's examples, or those of both levels, to be split by
            ``args.upper_fraction``.
        upper_dataset: the upper level's examples. Never ``eval_dataset``.
        trainer: what else `transformers.Trainer` takes.

    Logged beside the Trainer's own ``loss``, ``grad_norm``, ``learning_rate`` (the lower
    level's): ``upper_loss``, ``upper_grad_norm`` (of the hypergradient before clipping),
    ``upper_learning_rate``, ``implicit_ratio`` (‖implicit‖/‖direct‖), ``residual``, ``skipped``,
    and the numbers that the levels' losses return, as ``upper_…`` and ``lower_…``; means since
    the last log.

    Raises:
        ProblemError: levels that share a tensor or have data or an optimizer of their own, data
            sets that overlap, an optimizer that does not hold exactly the levels' variables, or
            a setting under which hypergradients would be wrong (fp16, DeepSpeed, FSDP1, FSDP2
            with second-order products, threads of ``DataParallel``) or that the levels would
            ignore (a loss function, label smoothing).
    """

    args: BilevelTrainingArguments
    optimizer: Any
    #: Whether the levels' losses are the Trainer's own, label smoothing and all.
    trainer_loss = False

    def __init__(
        self,
        model: nn.Module,
        *,
        lower: Problem,
        upper: Problem | None,
        args: BilevelTrainingArguments,
        train_dataset: Any,
        upper_dataset: Any = None,
        **trainer: Any,
    ) -> None:
        check_arguments(args, model, trainer, trainer_loss=self.trainer_loss)
        levels = [lower] if upper is None else [lower, upper]
        check_levels(levels)
        require_examples("train_dataset", train_dataset)
        if self.trainer_loss:
            for data in (train_dataset, upper_dataset):
                check_labels(model, data, trainer)
        if upper is not None:
            if upper_dataset is None:
                seed = args.seed if args.data_seed is None else args.data_seed
                train_dataset, upper_dataset = split_dataset(
                    train_dataset, args.upper_fraction, seed
                )
                require_apart(None, upper_dataset, trainer.get("eval_dataset"))
            else:
                require_examples("upper_dataset", upper_dataset, by_index=True)
                require_apart(train_dataset, upper_dataset, trainer.get("eval_dataset"))
        elif upper_dataset is not None:
            raise ProblemError("there is an upper_dataset, but no upper level")
        self.lower, self.upper, self.upper_dataset = lower, upper, upper_dataset
        check_batches(args, train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, **trainer)
        self.estimator = args.estimator()
        if upper is not None:
            check_estimator(self.estimator, upper, lower)
        check_accelerator(self)
        check_optimizer(self.optimizer, self.lr_scheduler, levels)
        self._used_columns(self.train_dataset, "train_dataset")
        # A step's loss is the mean of its micro-batches' losses, at both levels.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.skipped = 0
        self._accumulated = Accumulated(lower)
        self._accumulated.max_grad_norm = args.max_grad_norm or None
        self._devices = devices_of(*levels)
        self._copies = Copies()
        self._micro: list[MicroBatch] = []
        self._noted: dict[str, list[float]] = {}
        self._losses: list[Tensor] = []
        self._unread: set[str] | None = None  # upper variables that f does not read, once known
        self._upper_read = False
        self._window = None
        self.add_callback(GoOn(self))
        self._upper_batches: UpperBatches | None = None
        if upper is not None:
            self._upper_batches = self._make_upper_batches()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`; ``True`` resumes from the last whole checkpoint.

        A resumed run ends bit by bit like one that was not interrupted. As with the Trainer, an
        exception is a ``data_collator`` or data set that draws random numbers, such as masks.

        Raises:
            ProblemError: no whole checkpoint, a damaged one, or one of other settings; fewer
                steps than ``lower_steps``; examples of which no batch can be made; a loss that
                is no scalar, or a variable that no loss reads, at the level's first step.
            NonFiniteError: see ``args.non_finite``; names step and batch.
        """
        folder = None
        if resume_from_checkpoint is True:
            folder = checkpoint.last_whole(Path(self.args.output_dir))
            if folder is None:
                raise ProblemError(f"there is no whole checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
        self._micro.clear()
        self._losses.clear()
        self._noted.clear()
        self._kept, self._packed = {}, None
        if folder is not None:
            self._resume(folder)
        variables = [v for level in self._levels for v in level.variables]
        processes.broadcast(variables, self.args.device)
        output = super().train(None if folder is None else str(folder), *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """``args.optim`` over both levels, with groups of their own."""
        if self.optimizer is None:
            cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
            takes_groups = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
            if not takes_groups or options.keys() & {"params", "model", "optimizer_dict"}:
                raise ProblemError(
                    f"the optimizer {getattr(cls, '__name__', cls)} chooses its own parameters; "
                    "choose one that takes groups, such as adamw_torch"
                )
            try:
                self.optimizer = cls(self._groups(), **options)
            except (TypeError, ValueError) as error:
                raise ProblemError(f"{cls.__name__} does not take {options}: {error}") from error
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `transformers.Trainer.create_scheduler`, for a run in which the upper level moves."""
        self.require_upper_step(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def require_upper_step(self, steps: int) -> None:
        """Raise ProblemError where a run of ``steps`` lower steps has no upper one."""
        if self.upper is not None and steps < self.args.lower_steps:
            raise ProblemError(
                f"lower_steps={self.args.lower_steps} leaves no upper step in a run of "
                f"{steps} steps; train for longer or lower lower_steps"
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; FSDP2 puts shards in the variables' place, and the levels own them."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        reshard(self.model)
        before = self._held(self.create_optimizer())
        prepared = super()._prepare_for_training(*args, **kwargs)
        shard = dict(zip(map(id, before), self._held(self.optimizer), strict=True))
        for level in self._levels:
            level.variables = tuple(shard[id(variable)] for variable in level.variables)
        self._devices = devices_of(*self._levels)
        self._accumulated, self._copies = Accumulated(self.lower), Copies()
        self._accumulated.max_grad_norm = self.args.max_grad_norm or None
        return prepared

    @staticmethod
    def _held(optimizer: Any) -> list[Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _groups(self) -> list[dict[str, Any]]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        known = {id(p) for p in named.values()}
        decaying = {id(named[name]) for name in self.get_decay_parameter_names(self.model)}
        owned = self.lower.variables
        decay = [v for v in owned if id(v) in decaying or id(v) not in known]
        plain = [v for v in owned if id(v) in known - decaying]
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": self.args.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        if self.upper is not None:
            twin = {
                "lr": self.args.upper_learning_rate,
                "weight_decay": self.args.upper_weight_decay,
            }
            groups.append({"params": list(self.upper.variables), **twin})
        return [group for group in groups if group["params"]]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """A step's micro-batches, as `transformers.Trainer.get_batch_samples`."""
        with collating("train_dataset"):
            return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """In training the lower level's loss; otherwise the model's own."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, metrics = self.lower.evaluate(inputs)
        self._note(**{f"lower_{key}": value for key, value in metrics.items()})
        return loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; after a step's last one each ``.grad`` is what the variable moves by."""
        if not self._micro:
            self._begun = self._unlogged(), self.current_flos, self.state.num_input_tokens_seen
            # The Trainer empties the model's, and a level's variable may be outside it.
            self._clear_gradients()
        inputs = self._prepare_inputs(inputs)
        self._micro.append(MicroBatch(inputs, RandomState.capture(self._devices)))
        with versions.tracked(v for level in self._levels for v in level.variables):
            loss = processes.average(super().training_step(model, inputs, *args, **kwargs))
            self._losses.append(loss)
            if self.accelerator.sync_gradients:
                try:
                    self._set_gradients()
                except NonFiniteError as error:
                    self._non_finite(error)
                finally:
                    self._micro.clear()
                    self._losses.clear()
        return loss

    def _set_gradients(self) -> None:
        """Leave ∂f/∂w in the lower variables, and the hypergradient, or None, in the upper ones."""
        w = self.lower.variables
        u = () if self.upper is None else self.upper.variables
        gradient = processes.mean([x.grad for x in (*w, *u)], (*w, *u))
        below, of_upper = gradient[: len(w)], gradient[len(w) :]
        for variable in u:
            variable.grad = None
        self.lower.require_finite(torch.stack(self._losses).sum(), below)
        if self._unread is None:
            require_read(self.lower, below)
            names = () if self.upper is None else self.upper.names
            self._unread = {n for n, part in zip(names, of_upper, strict=True) if part is None}
        if self.upper is not None and self.estimator.upper_share:
            below = self._with_upper_share(self.upper, below)
        for variable, part in zip(w, below, strict=True):
            variable.grad = part
        if self.upper is not None and (self.state.global_step + 1) % self.args.lower_steps == 0:
            self._set_hypergradient(self.upper, of_upper)

    def _with_upper_share(
        self, upper: Problem, gradient: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        done = self.state.global_step
        batch = self._upper_batch(done + done // self.args.lower_steps)
        key = self.args.seed, "lower step", done + 1, *processes.own()
        random_state = RandomState.seeded(self._devices, *key)
        share = self.estimator.upper_share
        with self.compute_loss_context_manager():
            return with_upper_share(gradient, share, upper, self.lower, batch, random_state)

    def _upper_batch(self, number: int) -> Any:
        assert self._upper_batches is not None
        return self._prepare_inputs(self._upper_batches.batch(number))

    def _set_hypergradient(self, upper: Problem, of_upper: tuple[Tensor | None, ...]) -> None:
        step = self.state.global_step + 1
        # Where the lower steps read F, they have taken a batch each.
        taken = step if self.estimator.upper_share else 0
        batch = self._upper_batch(taken + step // self.args.lower_steps - 1)
        micro, start = list(self._micro), self._micro[0].random_state
        history = []
        if self.estimator.history:  # the step that is about to be taken, from where it starts
            with_state = self.estimator.needs_optimizer_state
            optimizer = snapshot(self.optimizer, self.lower.variables, with_state=with_state)
            history = [
                Step(
                    micro,
                    start,
                    variables=self._copies.take(self.lower.variables),
                    gradient=tuple(x.grad for x in self.lower.variables) if with_state else (),
                    upper_gradient=of_upper if self.estimator.reuses_lower_gradient else None,
                    optimizer=optimizer,
                )
            ]
        self._accumulated.half = self.lower.half
        oracle = Oracle(
            upper,
            self._accumulated,
            batch,
            micro,
            upper_random=RandomState.seeded(self._devices, self.args.seed, step, *processes.own()),
            lower_random=start,
            history=history,
            copies=self._copies,
            state=self._estimator_state(),
        )
        try:
            with self.compute_loss_context_manager():
                result = estimate(oracle, self.estimator)
        finally:
            for past in history:
                self._copies.give_back(past.variables)
        self._kept, self._packed = result.state, None
        above = oracle.upper_gradient.evaluation
        if not self._upper_read:
            require_read(upper, above.gradient[: len(upper.variables)], besides=self._unread)
            self._upper_read = True
        for variable, part in zip(
            upper.variables, like(result.hypergradient, upper.variables), strict=True
        ):
            variable.grad = part
        limit = self.args.upper_max_grad_norm or float("inf")
        norm = float(full(self.accelerator.clip_grad_norm_(upper.variables, limit)))
        self._note(
            upper_loss=above.loss,
            upper_grad_norm=norm,
            upper_learning_rate=self._own_groups(upper)[0]["lr"],
            implicit_ratio=result.implicit_ratio,
            residual=result.residual,
            **{f"upper_{key}": value for key, value in above.metrics.items()},
        )

    def _non_finite(self, error: NonFiniteError) -> None:
        """Skip the step and count it, or write a checkpoint of where it began and stop."""
        self._clear_gradients()
        if self.args.non_finite == "skip":
            self.skipped += 1
            return
        step = self.state.global_step + 1
        where = f"step {step} (epoch {self.state.epoch or 0:.2f}, {len(self._micro)} micro-batches)"
        # A run that resumes at an epoch's begin draws what the epoch's begin draws.
        began, random_state = self._epoch
        if began != self.state.global_step:
            random_state = self._micro[0].random_state
        random_state.restore()
        unlogged, self.current_flos, self.state.num_input_tokens_seen = self._begun
        self._set_unlogged(unlogged)
        written = "no checkpoint could be written"
        with suppress(ProblemError):
            folder = Path(self.args.output_dir) / f"{checkpoint.PREFIX}{step - 1}"
            if not (folder / checkpoint.SEAL).exists():
                self._save_checkpoint(self.model, None)
            written = f"the state before it is in {folder}"
        raise NonFiniteError(f"{where}: {error}; {NON_FINITE_ADVICE}; {written}") from error

    def _clear_gradients(self) -> None:
        for level in self._levels:
            for variable in level.variables:
                variable.grad = None

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        limit = self.args.max_grad_norm
        norm: Tensor = self.accelerator.clip_grad_norm_(self.lower.variables, limit)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(self.lower.variables, float("inf"))
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `transformers.Trainer.log`, with the levels' own numbers beside the loss."""
        if "loss" in logs:
            self._average_notes()
            means = {key: sum(values) / len(values) for key, values in self._noted.items()}
            if "upper_learning_rate" in self._noted:
                means["upper_learning_rate"] = self._noted["upper_learning_rate"][-1]
            if self.skipped:
                means["skipped"] = self.skipped
            logs.update({key: value for key, value in means.items() if key not in logs})
            self._noted.clear()
        if "train_loss" in logs:  # of the whole run, wherever it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _note(self, **values: float | None) -> None:
        for key, value in values.items():
            # ‖implicit‖/‖direct‖ is infinite where F does not read u itself.
            if value is not None and value != float("inf"):
                self._noted.setdefault(key, []).append(value)

    def _own_groups(self, level: Problem) -> list[dict[str, Any]]:
        own = {id(variable) for variable in level.variables}
        return [g for g in self.optimizer.param_groups if own & {id(p) for p in g["params"]}]

    def _make_upper_batches(self) -> UpperBatches:
        data, collate = self._used_columns(self.upper_dataset, "upper_dataset"), self.data_collator
        if not isinstance(data, Dataset):
            collate = self._get_collator_with_removed_columns(collate, description="upper")
        return UpperBatches(
            data,
            self.args.per_device_upper_batch_size or self.args.per_device_train_batch_size,
            seed=self.args.seed,
            collate=collate,
            rank=processes.rank(),
            processes=processes.count(),
        )

    def _used_columns(self, data: Any, name: str) -> Any:
        """``data`` without the columns that the model's forward does not take."""
        if not isinstance(data, Dataset):
            return data
        try:
            return self._remove_unused_columns(data, description=name)
        except ValueError as error:
            raise ProblemError(f"{name}: {error}") from error
