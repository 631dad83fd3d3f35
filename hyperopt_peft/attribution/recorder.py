"""Repeats the training of another Trainer with a weight for each row, and records its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Never

import torch
from torch import Tensor, nn

from hyperopt_peft.attribution.rows import TrainerData
from hyperopt_peft.attribution.run import ParameterUpdate, Run
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import WEIGHT
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.trainer.internals import metrics_restored
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.phases import Phase, lower_of, upper_of
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.trainer.tags import INDEX, without
from hyperopt_peft.trainer.task_loss import depends_on_count
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.models import trainable


@dataclass
class Recording:
    """What both phases of a recorded training share."""

    weights: Tensor  # v, of the rows, (n,)
    loss: Any  # a `WeightedRows`: the mean loss with a weight for each row
    options: Mapping[str, Any]  # arguments of `Run`
    scaled: bool | None  # as of `LossRule`
    sums: bool = False  # whether a step is the sum of its micro-batches' losses
    run: Run | None = None  # from the first step on


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
        """As in `BilevelTrainer`; also begins the run, or its second phase."""
        super().adopt_prepared_parameters()
        # `task_loss` reads no count of labels.
        self.loss_rule = replace(self.loss_rule, counts=False, scaled=self.recording.scaled)
        limits = (self.args.max_grad_norm, self.args.upper_max_grad_norm)
        levels = [
            Accumulated(level, self.optimizer, limit or None, calls)
            for level, limit, calls in zip(self.levels, limits, (None, lambda: self.calls))
        ]
        self._assigned: dict[int, Tensor] = {}
        run, recording = self.recording.run, self.recording
        if run is None:
            length = self.state.max_steps
            if self.has_second_phase:
                length += self.args.for_retraining().steps_of(len(self.all_rows()))
            recording.run = Run(levels, recording.weights, length, **recording.options)
            self._first = 0
            return
        self._first = len(run.levels)
        for level in levels:
            run.add(level)
        if self.args.retrain == "scratch":
            indices = run.indices[self._first]
            self._assigned = {k: run.variables[k].detach().clone() for k in indices}

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
        run, step, weights = self.recording.run, self.current_step, self.recording.weights
        assert run is not None
        (of_weights,) = distributed.mean((weights.grad,), (weights,))
        weights.grad = None
        gradient: Any = [*(v.grad for v in run.levels[self._first].variables), of_weights]
        updates = [self._update(run, self._first, step.micro, gradient)]
        if step.upper:  # training does not differentiate its loss in the row weights
            number, level = self._first + 1, run.levels[self._first + 1]
            _, _, gradient = level.differentiate(step.upper, (*level.variables, weights))
            updates.append(self._update(run, number, step.upper, gradient))
        run.record(*updates, assigned=self._assigned)
        self._assigned = {}

    def _update(self, run: Run, level: int, batch: list[MicroBatch], slope: Any) -> ParameterUpdate:
        parts = distributed.average(self._parts(batch))
        return run.update(level, [*batch], batch[0].random_state, slope, parts)

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
    trainer: Any, args: Any, data: TrainerData, options: Mapping[str, Any], *, twice: bool
) -> RecordedTrainer:
    """A trainer that trains the model of ``trainer`` as it would, in one phase or two.

    The method of ``trainer`` has prepared the model. The method's levels get a `task_loss` in which
    each row has a weight. ``options`` are arguments of `Run`; ``twice`` says whether losses are
    differentiated twice. Nothing is logged.
    """
    method, model = method_of(trainer), trainer.model
    dtype = torch.promote_types(trainable(model)[0][1].dtype, torch.float32)
    weights = torch.ones(len(data.train_rows), dtype=dtype, device=args.device, requires_grad=True)
    tags = (*method.tags, INDEX)
    how: dict[str, Any] = {"variables": [weights], "tags": tags, "twice": twice}
    loss = WeightedRows(model, lambda x: weights[x[INDEX]], **how)
    stock = not isinstance(trainer, BilevelTrainer)
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None and stock:
        scaled = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    lower, upper = data.of_levels
    made = RecordedTrainer(
        model,
        args,
        recording=Recording(weights, loss, options, scaled=None if scaled else scaled),
        method=Phase(
            method, lower_of, None if upper is None else upper_of, data.of_retraining, tags
        ),
        train_dataset=lower,
        upper_dataset=upper,
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
