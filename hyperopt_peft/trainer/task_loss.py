"""The loss that a Trainer trains, in the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hyperopt_peft.core.labels import ITEMS, MICRO_BATCHES, WEIGHT, model_reads
from hyperopt_peft.trainer.internals import metrics_restored
from hyperopt_peft.trainer.loss_rule import LossRule
from hyperopt_peft.trainer.over import CombinedTrainer
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils import distributed


class TaskLossTrainer(CombinedTrainer):
    """A Trainer whose loss a level can read: ``task_loss``, a function of a micro-batch."""

    #: Whether the levels are functions of the trainer, which may read its loss.
    trainer_loss: bool
    #: Columns of the batches that a level reads and the model does not.
    tags: Sequence[str] = ()
    model: Any

    @classmethod
    def has_own_loss(cls) -> bool:
        """Whether this class, or the one that it stands before, overrides ``compute_loss``."""
        stock = (TaskLossTrainer, Trainer)
        return any("compute_loss" in vars(base) for base in cls.__mro__ if base not in stock)

    def _set_loss_rule(self) -> None:
        custom = self.compute_loss_func is not None
        self._loss_rule = LossRule(
            self.model,
            self.task_loss,
            self._measuring,
            self.args.device,
            scaled=getattr(self, "loss_is_scaled_for_ga", None),
            sums=(custom or self.model_accepts_loss_kwargs)
            and self.args.gradient_accumulation_steps > 1,
            custom=custom or self.has_own_loss(),
        )

    def _with_entries(self, batches: Sequence[Any]) -> list[Any]:
        """The micro-batches of a step of either level, with the entries that its loss reads."""
        args = self.args
        counted = super().get_batch_samples(iter(batches), len(batches), args.device)
        samples: list[Any] = list(counted[0])
        if not self.trainer_loss:  # losses of the levels' own know no labels
            return samples
        read = [without(batch, self.tags) for batch in samples] if self.tags else samples
        entries = self._loss_rule.entries(read, counted[1], args.average_tokens_across_devices)
        return [{**b, **e} if e else b for b, e in zip(samples, entries, strict=True)]

    def task_loss(self, batch: Any) -> Tensor:
        """The loss that the Trainer would train: a scalar, whose mean over micro-batches counts.

        With the entries of `LossRule`, the mean over the micro-batches and processes of a step is
        the mean over all of its labels.

        Raises:
            ProblemError: the model cannot compute a loss for ``batch``.
        """
        inputs = without(batch, self.tags)
        weight, items, n = (inputs.pop(entry, None) for entry in (WEIGHT, ITEMS, MICRO_BATCHES))
        if n is not None:  # TRL divides the auxiliary loss of a mixture of experts by it
            self.current_gradient_accumulation_steps = n
        with model_reads(batch):
            loss: Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=items)
        if n is not None:
            # In 64 bits the division by n, for the mean over micro-batches, gives the loss again.
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

        With a count of labels the Trainer multiplies the loss by the number of processes, also when
        the model averages over rows itself. Such a model gets no count.
        """
        compute, items = super().compute_loss, num_items_in_batch
        multiplied = items is not None and distributed.world_size() > 1
        if multiplied and not self._loss_rule.model_reads_items(compute, model, inputs):
            items = None
        return compute(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.prediction_step`, without tags."""
        if self.tags:
            inputs = without(inputs, self.tags)
        return super().prediction_step(model, inputs, *args, **kwargs)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """A context for a loss that nothing is trained by."""
        with metrics_restored(self), self.compute_loss_context_manager():
            yield
