"""Repeats the training of another Trainer with a weight for each row, and records its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Never

import torch
from torch import Tensor, nn

from hyperopt_peft.attribution.rows import TrainerData
from hyperopt_peft.attribution.run import Run
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import WEIGHT
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.trainer.internals import metrics_restored
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.phases import Phase, lower_of
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.trainer.tags import INDEX, without
from hyperopt_peft.trainer.task_loss import depends_on_count
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import trainable


class RecordedTrainer(BilevelTrainer):
    """Trains the model of ``data`` as its Trainer would, and records the steps in ``run``.

    The Trainer's method has prepared the model. The method's level gets a `task_loss` in which each
    row has a weight. Nothing is logged.

    Args:
        data: the Trainer and its rows.
        args: of this training.
        twice: whether losses are differentiated twice.
        options: arguments of `Run`.
    """

    run: Run
    #: Whether a step is the sum of its micro-batches' losses.
    sums = False

    def __init__(self, data: TrainerData, args: Any, *, twice: bool, **options: Any) -> None:
        trainer, method, rows = data.trainer, data.method, data.train_rows
        self.run_options = options
        tags = (*method.tags, INDEX)
        dtype = torch.promote_types(trainable(data.model)[0][1].dtype, torch.float32)
        weights = torch.ones(len(rows), dtype=dtype, device=args.device, requires_grad=True)
        self.row_weights = weights
        self.weighted = WeightedRows(
            data.model,
            lambda batch: weights[batch[INDEX]],
            [weights],
            tags=tags,
            twice=twice,
            row_losses=data.rule,
        )
        stock = not isinstance(trainer, BilevelTrainer)
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None and stock:
            scaled = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        self.scaled = None if scaled else scaled  # as of `LossRule`
        # With model_init the Trainer makes optimizer and schedule itself.
        optimizers = trainer.optimizer, trainer.lr_scheduler
        super().__init__(
            data.model,
            args,
            method=Phase(method, lower_of, None, (rows, None), tags, row_losses=data.rule),
            train_dataset=rows,
            data_collator=data.collate,
            optimizer_cls_and_kwargs=trainer.optimizer_cls_and_kwargs,
            optimizers=(None, None) if trainer.model_init else optimizers,
            processing_class=trainer.processing_class,
        )
        self.sums = bool(stock and scaled) and not self._reads_count(data)
        if type(method) is Method:
            self.lower.name = "training"

    def _reads_count(self, data: TrainerData) -> bool:
        """Whether the loss of the Trainer of ``data`` depends on the number of labels in a step."""
        batch, *_ = data.batches(data.train_rows, range(len(data.train_rows))[:8])
        loss = data.trainer.compute_loss
        inputs = without(batch, self.tags)
        with metrics_restored(data.trainer):
            reads = depends_on_count(
                lambda n: loss(self.model, {**inputs}, num_items_in_batch=n),
                self.model,
                self.args.device,
                self.measuring,
            )
        return reads is not False

    def with_entries(self, batches: Sequence[Any]) -> list[Any]:
        """As in `BilevelTrainer`, or so that the mean over the step is a sum."""
        samples = super().with_entries(batches)
        if not self.sums:
            return samples
        # A stock Trainer adds the means up, and multiplies them by the number of processes.
        scale = distributed.world_size() if self.args.average_tokens_across_devices else 1
        weight = torch.tensor(float(len(samples) * scale))
        return [{**batch, WEIGHT: weight} for batch in samples]

    def task_loss(self, batch: Any, *, training: bool = True) -> Tensor:
        """The model's loss with a weight for each row, with dropout if ``training``."""
        self.calls += 1
        self.model.train(training)
        with self.compute_loss_context_manager():
            loss: Tensor = self.weighted.loss(batch)["loss"]
            return loss

    def adopt_prepared_parameters(self) -> None:
        """As in `BilevelTrainer`; also begins the run."""
        super().adopt_prepared_parameters()
        # `task_loss` reads no count of labels.
        self.loss_rule = replace(self.loss_rule, counts=False, scaled=self.scaled)
        level = Accumulated(self.lower, self.optimizer, self.args.max_grad_norm or None)
        self.run = Run(level, self.row_weights, self.state.max_steps, **self.run_options)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As in `BilevelTrainer`; also records a step once its gradients are complete."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = self.current_step
        if step.complete:
            step.return_gradients()
            self._record(step.micro)
            step.withhold_gradients()
        return loss

    def _record(self, batch: Sequence[MicroBatch]) -> None:
        weights = self.row_weights
        (of_weights,) = distributed.mean((weights.grad,), (weights,))
        weights.grad = None
        gradient = [*(v.grad for v in self.run.variables), of_weights]
        parts = distributed.average(self._parts(batch))
        self.run.record([*batch], batch[0].random_state, gradient, parts)

    def _parts(self, batch: Sequence[MicroBatch]) -> Tensor:
        """The factor of each row's mean loss in the loss of ``batch``, 0 for others, ``(n,)``."""
        parts = torch.zeros_like(self.row_weights)
        for micro in batch:
            rows = micro.batch[INDEX].unique()
            weight = micro.weight * torch.as_tensor(micro.batch.get(WEIGHT, 1.0))
            # Rows without labels have the weight 0, and were seen.
            parts[rows] += weight.clamp(min=1e-30).to(parts) / (len(rows) * len(batch))
        return parts

    def handle_non_finite(self, error: NonFiniteError) -> Never:
        """Raise, since the steps before are recorded in memory."""
        step = self.state.global_step + 1
        raise NonFiniteError(
            f"step {step}: {error}; lower the learning rate or max_grad_norm"
        ) from error

    def log(self, *_: Any, **__: Any) -> None:
        """Log nothing."""
