"""The loss that a Trainer trains, in the micro-batches of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from hyperopt_peft.core.labels import (
    ITEMS,
    MICRO_BATCHES,
    WEIGHT,
    label_weights,
    labels_are_shifted,
    model_reads,
)
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.internals import metrics_restored
from hyperopt_peft.trainer.over import CombinedTrainer
from hyperopt_peft.trainer.passes import PassCounter
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import reshard
from hyperopt_peft.utils.restore import preserve_state

logger = logging.getLogger(__name__)


class TaskLossTrainer(CombinedTrainer):
    """A Trainer whose loss a level can read: ``task_loss``, a function of a micro-batch.

    The mean of the micro-batches' losses is the loss that the Trainer trains. A loss that reads the
    number of labels in its step is divided by that number. The losses of others are weighted by
    their labels, unless the Trainer's class says that the mean of the micro-batches counts.
    """

    #: Whether the levels are functions of the trainer, which may read its loss.
    trainer_loss: bool
    #: Columns of the batches that a level reads and the model does not.
    tags: Sequence[str] = ()
    #: The passes and seconds of the training, both phases of a method together.
    passes: PassCounter
    model: Any

    @classmethod
    def has_own_loss(cls) -> bool:
        """Whether this class, or the one that it stands before, overrides ``compute_loss``."""
        stock = (TaskLossTrainer, Trainer)
        return any("compute_loss" in vars(base) for base in cls.__mro__ if base not in stock)

    def _set_loss_rule(self) -> None:
        # The loss is one of the whole step (True), of each micro-batch (False), or unknown (None).
        self._scaled = getattr(self, "loss_is_scaled_for_ga", None)
        self._reads_items, self._model_reads_items = self._scaled, self._scaled
        self._custom = self.compute_loss_func is not None or self.has_own_loss()
        self._warned = False

    def _with_entries(self, batches: Sequence[Any]) -> list[Any]:
        """The micro-batches of a step of either level, with the entries that its loss reads.

        See `core.labels`. The first call measures whether the loss reads the number of labels.
        """
        args = self.args
        counted = super().get_batch_samples(iter(batches), len(batches), args.device)
        samples, items = list(counted[0]), counted[1]
        # No sample: an epoch that was resumed at its end. Losses of the levels' own know no labels.
        if not samples or not self.trainer_loss or self._scaled is False:
            return samples
        read = [without(batch, self.tags) for batch in samples] if self.tags else samples
        entries: list[dict[str, Any]] = label_weights(read, shifted=self._shifted(read[0]))
        if items is not None or self._scaled:
            if items is not None and not args.average_tokens_across_devices:
                items = distributed.average(torch.as_tensor(items, dtype=torch.float32))
            if self._reads(read[0]):
                of_step = {ITEMS: items, MICRO_BATCHES: len(samples)}
                entries = [{**entry, **of_step} for entry in entries]
            else:
                self._warn_of_sums(len(samples))
        return [{**b, **e} if e else b for b, e in zip(samples, entries, strict=True)]

    def _warn_of_sums(self, count: int) -> None:
        sums = self._custom or self.model_accepts_loss_kwargs
        if count > 1 and sums and self.args.gradient_accumulation_steps > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "gradient_accumulation_steps: the loss ignores num_items_in_batch, so that "
                "transformers.Trainer trains the sum of the micro-batches' losses, and this "
                "trainer their mean; a learning rate is not the same in both"
            )

    def _shifted(self, batch: Any) -> bool:
        if not isinstance(batch, Mapping):
            return False
        try:
            with self._measuring():
                return labels_are_shifted(self.model, send_to_device(batch, self.args.device))
        except ProblemError:
            if self._custom:  # the model may have no loss
                return False
            raise

    def _reads(self, batch: Any) -> bool:
        """Whether ``task_loss`` depends on the number of labels."""
        if self._reads_items is None:
            batch = send_to_device(batch, self.args.device)
            self._reads_items = self._differs(
                # Of a copy, since a model may mask its inputs in place, as Whisper does.
                lambda items: self.task_loss({**deepcopy(batch), ITEMS: items, MICRO_BATCHES: 1})
            )
        return self._reads_items is not False

    def _differs(self, loss: Callable[[Tensor], Tensor]) -> bool | None:
        """Whether ``loss`` of 1 and of 1024 labels differ; None, so far unknown, where it is 0.

        Each evaluation starts from one random state. Two of 1 label say by how much those differ
        that do not read the number: by rounding, or by random numbers that cannot be replayed.
        """
        values, device = [], self.args.device
        for number in (1, 1024, 1):
            with preserve_state((), [device]), torch.no_grad(), self._measuring():
                values.append(loss(torch.tensor(number, device=device)))
        reshard(self.model)
        one, many, again = values
        if not one or not one.isfinite():
            return None
        noise = abs(one - again)
        if noise <= 1e-2 * abs(one):
            return bool(abs(one - many) > 8 * noise)
        logger.warning(
            "the loss draws from a random generator of its own, which cannot be replayed; draw "
            "from the global ones of PyTorch, NumPy or Python"
        )
        return bool(abs(one) > 32 * abs(many))

    def task_loss(self, batch: Any) -> Tensor:
        """The loss that the Trainer would train: a scalar, whose mean over micro-batches counts.

        With the entries of a step, the mean over its micro-batches and processes is the mean over
        all of its labels.
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
        if items is not None and distributed.world_size() > 1:
            if self._model_reads_items is None:
                self._model_reads_items = self._differs(
                    lambda count: compute(model, deepcopy(dict(inputs)), num_items_in_batch=count)
                )
            if self._model_reads_items is False:
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
        with metrics_restored(self), self.passes.paused(), self.compute_loss_context_manager():
            yield
