"""`BilevelTrainer`: two levels driven by `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine import checkpoint
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimate import check_estimator
from hyperopt_peft.trainer.accelerator import check_accelerator
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.checks import (
    check_arguments,
    check_batches,
    check_labels,
    check_levels,
    check_optimizer,
)
from hyperopt_peft.trainer.data import UpperBatches, require_apart, require_examples, split_dataset
from hyperopt_peft.trainer.sealed_trainer import GoOn
from hyperopt_peft.trainer.trainer_step import StepTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import reshard


class BilevelTrainer(StepTrainer):
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
            ignore (a loss function, label smoothing, compilation).
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
        self._begin_run()
        self.add_callback(GoOn(self))
        self._upper_batches = None
        if upper is not None:
            self._upper_batches = self._make_upper_batches()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `transformers.Trainer.train`; ``True`` resumes from the last whole checkpoint.

        A resumed run ends bit by bit like one that was not interrupted. As with the Trainer,
        exceptions are a ``data_collator`` or data set that draws random numbers, such as masks,
        and a log or evaluation at the end of an epoch whose last step wrote the checkpoint.

        Raises:
            ProblemError: no whole checkpoint, a damaged one, or one of other settings; fewer
                steps than ``lower_steps``; examples of which no batch can be made; a loss that
                is no scalar, or a variable that no loss reads, at the level's first step.
            NonFiniteError: see ``args.non_finite``; names step and batch.
        """
        found = checkpoint.to_resume(resume_from_checkpoint, Path(self.args.output_dir))
        return self._train_from(found, *args, **kwargs)

    def _train_from(
        self, found: tuple[Path, Mapping[str, Any]] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """``found``: the checkpoint to resume from, with its record."""
        self._begin_run()
        if found is not None:
            self._resume(*found)
        variables = [v for level in self._levels for v in level.variables]
        distributed.broadcast(variables, self.args.device)
        output = super().train(None if found is None else str(found[0]), *args, **kwargs)
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

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """As the Trainer's; FSDP2 puts shards in the variables' place, and the levels own them."""
        if self.is_fsdp_enabled:
            reshard(self.model)
        before = self._held(self.create_optimizer())
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        now = dict(zip(map(id, before), self._held(self.optimizer), strict=True))
        for level in self._levels:
            level.variables = tuple(now[id(variable)] for variable in level.variables)
        self._take_levels()
        if resume_from_checkpoint is not None:
            # The model's files need not have them as they are, a product of two for example.
            self._load_levels(Path(resume_from_checkpoint))
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

    def _make_upper_batches(self) -> UpperBatches:
        data, collate = self._used_columns(self.upper_dataset, "upper_dataset"), self.data_collator
        if not isinstance(data, Dataset):
            collate = self._get_collator_with_removed_columns(collate, description="upper")
        return UpperBatches(
            data,
            self.args.per_device_upper_batch_size or self.args.per_device_train_batch_size,
            seed=self.args.seed,
            collate=collate,
            rank=distributed.rank(),
            processes=distributed.count(),
        )

    def _used_columns(self, data: Any, name: str) -> Any:
        """``data`` without the columns that the model's forward does not take."""
        if not isinstance(data, Dataset):
            return data
        try:
            return self._remove_unused_columns(data, description=name)
        except ValueError as error:
            raise ProblemError(f"{name}: {error}") from error
