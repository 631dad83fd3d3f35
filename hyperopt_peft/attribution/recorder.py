"""Repeats the training of another Trainer with a weight for each row, and records its steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Never

import torch
from torch import Tensor, nn

from hyperopt_peft.attribution.rows import ROW
from hyperopt_peft.attribution.run import ParameterUpdate, Run
from hyperopt_peft.attribution.trainer_data import TrainerData
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.passes import PassCounter
from hyperopt_peft.trainer.phases import lower_of, options_of_retraining, upper_of
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import trainable


class RecordedTrainer(BilevelTrainer):
    """Trains the model of ``trainer`` as it would, in one phase or two; records steps in ``run``.

    The method of ``trainer`` has prepared the model. The method's levels get a `task_loss` in which
    each row has a weight. ``options`` are arguments of `Run`; ``twice`` says whether losses are
    differentiated twice. Nothing is logged.
    """

    run: Run | None = None

    def __init__(
        self, trainer: Any, args: Any, data: TrainerData, options: dict[str, Any], *, twice: bool
    ) -> None:
        self.method, self.passes = (method := method_of(trainer)), PassCounter()
        self.tags, self.twice, self.options = (*method.tags, ROW), twice, options
        self._rows = data.of_retraining
        dtypes = [parameter.dtype for _, parameter in trainable(trainer.model)]
        dtype = torch.promote_types((dtypes or [torch.float32])[0], torch.float32)
        ones = torch.ones(len(data.train_rows), dtype=dtype, device=args.device)
        self.weights = ones.requires_grad_()
        # With model_init the Trainer makes optimizer and schedule itself.
        given = (None, None) if trainer.model_init else (trainer.optimizer, trainer.lr_scheduler)
        more = {
            "data_collator": data.collate,
            "optimizer_cls_and_kwargs": trainer.optimizer_cls_and_kwargs,
            "optimizers": given,
        }
        self._options = options_of_retraining(more)
        more |= zip(("train_dataset", "upper_dataset"), data.of_levels, strict=True)
        more["processing_class"] = trainer.processing_class
        upper = None if data.of_levels[1] is None else upper_of
        self._set_up(trainer.model, args, lower=lower_of, upper=upper, **more)
        if type(method) is Method:
            self.lower.name = "training"

    def _set_loss_rule(self) -> None:
        self.model_accepts_loss_kwargs = False  # the loss here reads no count of labels
        super()._set_loss_rule()

    @cached_property
    def weighted(self) -> WeightedRows:
        """The model's loss with a weight for each row."""
        weights, how = self.weights, dict[str, Any](tags=self.tags, twice=self.twice)
        return WeightedRows(self.model, lambda batch: weights[batch[ROW]], [weights], **how)

    def task_loss(self, batch: Any, *, training: bool = True) -> Tensor:
        """The loss `weighted` in the precision of training, with dropout if ``training``."""
        self.model.train(training)
        with self.compute_loss_context_manager():
            return self.weighted.weighted(self.weighted.losses(batch), batch)["loss"]

    def adopt_prepared_parameters(self) -> None:
        """As in `BilevelTrainer`; also begins the run, or its second phase."""
        super().adopt_prepared_parameters()
        limits = (self.args.max_grad_norm, self.args.upper_max_grad_norm)
        levels = [
            Accumulated(level, self.optimizer, limit or None)
            for level, limit in zip(self.levels, limits)
        ]
        self._assigned: dict[int, Tensor] = {}
        if self.run is None:
            length = self.state.max_steps
            if self.has_second_phase:
                length += self.args.for_retraining().steps_of(len(self.all_rows()))
            self.run = Run(levels, self.weights, length, **self.options)
            self._first = 0
            return
        self._first = len(self.run.levels)
        for level in levels:
            self.run.add(level)
        if self.args.retrain == "scratch":
            indices = self.run.indices[self._first]
            self._assigned = {k: self.run.variables[k].detach().clone() for k in indices}

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As in `BilevelTrainer`; also records a step once its gradients are complete."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = self.current_step
        if step.complete:
            step.return_gradients()
            self._record()
            step.withhold_gradients()
        return loss

    def _record(self) -> None:
        run, step, weights = self.run, self.current_step, self.weights
        assert run is not None
        shares = (weights.grad, self._seen(step.micro))
        of_weights, visits = distributed.mean(shares, (weights, weights))
        assert visits is not None
        weights.grad = None
        gradient = [*(v.grad for v in run.levels[self._first].variables), of_weights]
        random_state = step.micro[0].random_state
        updates = [run.update(self._first, list(step.micro), random_state, gradient, visits > 0)]
        if step.upper:
            updates.append(self._upper_update(run, step.upper))
        run.record(*updates, assigned=self._assigned)
        self._assigned = {}

    def _upper_update(self, run: Run, batch: list[MicroBatch]) -> ParameterUpdate:
        """The upper level's update; computes the row weights' gradient, which training lacks."""
        number, level = self._first + 1, run.levels[self._first + 1]
        _, _, gradient = level.differentiate(batch, (*level.variables, self.weights))
        (visits,) = distributed.mean((self._seen(batch),), (self.weights,))
        assert visits is not None
        return run.update(number, batch, batch[0].random_state, gradient, visits > 0)

    def _seen(self, batch: Sequence[MicroBatch]) -> Tensor:
        """1 for each row of ``batch``, ``(n,)``."""
        seen = torch.zeros_like(self.weights)
        for micro in batch:
            seen[micro.batch[ROW]] = 1.0
        return seen

    def _skip_or_stop(self, error: NonFiniteError) -> Never:
        step = self.state.global_step + 1
        raise NonFiniteError(
            f"step {step}: {error}; lower the learning rate or max_grad_norm"
        ) from error

    def log(self, *_: Any, **__: Any) -> None:
        """Log nothing."""


def method_of(trainer: Any) -> Method:
    """The method of ``trainer``; for a stock Trainer a plain `Method`, which trains alike."""
    return getattr(trainer, "method", None) or Method()
