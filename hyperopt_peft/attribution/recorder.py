"""Repeats the training of another Trainer with a weight for each row, and records its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Never

import torch
from torch import Tensor, nn

from hyperopt_peft.attribution.rows import TrainerData
from hyperopt_peft.attribution.run import Run
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import WEIGHT, RowLosses
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


@dataclass
class Recording:
    """What a recorded training adds to that of its trainer."""

    weights: Tensor  # v, of the rows, (n,)
    loss: Any  # a `WeightedRows`: the mean loss with a weight for each row
    options: Mapping[str, Any]  # arguments of `Run`
    scaled: bool | None  # as of `LossRule`
    sums: bool = False  # whether a step is the sum of its micro-batches' losses
    run: Run | None = None  # once the optimizer is there


class RecordedTrainer(BilevelTrainer):
    """A bilevel trainer that records its steps in ``recording``; see `recorded`."""

    def __init__(self, model: Any, args: Any, *, recording: Recording, **options: Any) -> None:
        self.recording = recording
        super().__init__(model, args, **options)

    def with_entries(self, batches: Sequence[Any]) -> list[Any]:
        """As in `BilevelTrainer`, or so that the mean over the step is a sum."""
        samples = super().with_entries(batches)
        if not self.recording.sums:
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
            loss: Tensor = self.recording.loss.loss(batch)["loss"]
            return loss

    def adopt_prepared_parameters(self) -> None:
        """As in `BilevelTrainer`; also begins the run."""
        super().adopt_prepared_parameters()
        # `task_loss` reads no count of labels.
        self.loss_rule = replace(self.loss_rule, counts=False, scaled=self.recording.scaled)
        recording, limit = self.recording, self.args.max_grad_norm or None
        level, length = Accumulated(self.lower, self.optimizer, limit), self.state.max_steps
        recording.run = Run(level, recording.weights, length, **recording.options)

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
        run, weights = self.recording.run, self.recording.weights
        assert run is not None
        (of_weights,) = distributed.mean((weights.grad,), (weights,))
        weights.grad = None
        gradient = [*(v.grad for v in run.variables), of_weights]
        parts = distributed.average(self._parts(batch))
        run.record([*batch], batch[0].random_state, gradient, parts)

    def _parts(self, batch: Sequence[MicroBatch]) -> Tensor:
        """The factor of each row's mean loss in the loss of ``batch``, 0 for others, ``(n,)``."""
        parts = torch.zeros_like(self.recording.weights)
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


def recorded(
    trainer: Any,
    args: Any,
    data: TrainerData,
    options: Mapping[str, Any],
    *,
    twice: bool,
    rule: RowLosses | None = None,
) -> RecordedTrainer:
    """A trainer that trains the model of ``trainer`` as it would.

    The method of ``trainer`` has prepared the model. The method's level gets a `task_loss` in which
    each row has a weight. ``options`` are arguments of `Run`; ``twice`` says whether losses are
    differentiated twice; ``rule`` is the user's ``row_losses``. Nothing is logged.
    """
    method, model, rows = method_of(trainer), trainer.model, data.train_rows
    dtype = torch.promote_types(trainable(model)[0][1].dtype, torch.float32)
    weights = torch.ones(len(rows), dtype=dtype, device=args.device, requires_grad=True)
    tags = (*method.tags, INDEX)
    how: dict[str, Any] = {"variables": [weights], "tags": tags, "twice": twice}
    how["row_losses"] = rule
    loss = WeightedRows(model, lambda x: weights[x[INDEX]], **how)
    stock = not isinstance(trainer, BilevelTrainer)
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None and stock:
        scaled = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    made = RecordedTrainer(
        model,
        args,
        recording=Recording(weights, loss, options, scaled=None if scaled else scaled),
        method=Phase(method, lower_of, None, (rows, None), tags, row_losses=rule),
        train_dataset=rows,
        data_collator=data.collate,
        optimizer_cls_and_kwargs=trainer.optimizer_cls_and_kwargs,
        # With model_init the Trainer makes optimizer and schedule itself.
        optimizers=(None, None)
        if trainer.model_init
        else (trainer.optimizer, trainer.lr_scheduler),
        processing_class=trainer.processing_class,
    )
    made.recording.sums = bool(stock and scaled) and not _reads_count(trainer, made, data)
    if type(method) is Method:
        made.lower.name = "training"
    return made


def _reads_count(trainer: Any, made: RecordedTrainer, data: TrainerData) -> bool:
    """Whether the loss of ``trainer`` depends on the number of labels in a step."""
    batch, *_ = data.batches(data.train_rows, range(len(data.train_rows))[:8])
    loss, inputs = trainer.compute_loss, without(batch, made.tags)
    with metrics_restored(trainer):
        reads = depends_on_count(
            lambda n: loss(made.model, {**inputs}, num_items_in_batch=n),
            made.model,
            made.args.device,
            made.measuring,
        )
    return reads is not False


def method_of(trainer: Any) -> Method:
    """The method of ``trainer``; for a stock Trainer a plain `Method`, which trains alike."""
    return getattr(trainer, "method", None) or Method()
