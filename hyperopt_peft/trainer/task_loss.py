"""`TaskLossTrainer`: the loss that a Trainer trains, as a function of a micro-batch."""

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
    scored_labels,
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

    The mean of ``task_loss`` over a step's micro-batches is the loss that the Trainer trains.
    Micro-batches are weighted by their numbers of labels, unless the Trainer's class declares the
    plain mean (``loss_is_scaled_for_ga = False``).
    """

    #: Whether the levels are functions of the trainer, so that they may read its loss.
    trainer_loss: bool
    #: Columns of a batch that a level reads and the model does not.
    tags: Sequence[str] = ()
    #: The columns that the model takes, if tags pass beside them; else None.
    model_columns: set[str] | None = None
    #: Passes and seconds of the training, for both phases of a method together.
    passes: PassCounter
    model: Any
    #: The number of calls of `task_loss`.
    calls = 0
    _loss_checked = False  # by the first step

    @classmethod
    def has_own_loss(cls) -> bool:
        """Whether this class, or the Trainer that it extends, overrides ``compute_loss``."""
        stock = (TaskLossTrainer, Trainer)
        return any("compute_loss" in vars(base) for base in cls.__mro__ if base not in stock)

    def _set_loss_rule(self) -> None:
        # The loss is scaled to the step (True) or to a micro-batch (False); None: not yet known.
        self._scaled = getattr(self, "loss_is_scaled_for_ga", None)  # of Transformers 5.19
        self._reads_items, self._model_reads_items = self._scaled, self._scaled
        self._custom = self.compute_loss_func is not None or self.has_own_loss()
        self._warned = False

    def _with_entries(self, batches: Sequence[Any]) -> list[Any]:
        """A step's micro-batches, of either level, with the entries of `core.labels`.

        The first call measures whether the loss reads the step's number of labels.
        """
        samples = list(batches)
        # No samples: the run resumed at the end of an epoch. Levels' own losses read no entries.
        if not samples or not self.trainer_loss or self._scaled is False:
            return samples
        read = [without(batch, self.tags) for batch in samples] if self.tags else samples
        shifted = self._shifted(read[0])
        entries: list[dict[str, Any]] = label_weights(read, shifted=shifted)
        items = self._items(read, shifted)
        if items is not None or self._scaled:
            if self._reads(read[0]):
                of_step = {ITEMS: items, MICRO_BATCHES: len(samples)}
                entries = [{**entry, **of_step} for entry in entries]
            else:
                self._warn_of_sums(len(samples))
        return [{**b, **e} if e else b for b, e in zip(samples, entries, strict=True)]

    def _items(self, batches: Sequence[Any], shifted: bool) -> Tensor | None:
        """The number of labels of a step, by which a sum of losses is divided; None for a mean.

        The Trainer's own count has the first label of a causal model's rows before Transformers
        5.10, and misses that of a sequence-to-sequence model's rows before 5.15.
        """
        counts = [scored_labels(batch, shifted) for batch in batches]
        counted = [count for count in counts if count is not None]
        read = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not read or len(counted) < len(batches):
            return None
        items = distributed.average(torch.stack(counted).sum().float().to(self.args.device))
        # With this argument the Trainer multiplies the loss by the number of processes.
        together = self.args.average_tokens_across_devices
        return (items * distributed.world_size()).round() if together else items

    def _warn_of_sums(self, count: int) -> None:
        sums = self._custom or self.model_accepts_loss_kwargs
        if count > 1 and sums and self.args.gradient_accumulation_steps > 1 and not self._warned:
            self._warned = True
            logger.warning(
                "gradient_accumulation_steps: the loss ignores num_items_in_batch, so "
                "transformers.Trainer trains the sum of the micro-batches' losses, this trainer "
                "their mean; choose the learning rate for the mean"
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
                # A copy, since some models, such as Whisper, mask their inputs in place.
                lambda items: self.task_loss({**deepcopy(batch), ITEMS: items, MICRO_BATCHES: 1})
            )
        return self._reads_items is not False

    def _differs(self, loss: Callable[[Tensor], Tensor]) -> bool | None:
        """Whether ``loss`` differs for 1 and 1024 labels; None (not yet known) if it is 0.

        All evaluations start from the same random state. A second evaluation with 1 label measures
        the noise: rounding, or random numbers that cannot be replayed.
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
            "the loss draws from a random generator of its own, which cannot be replayed; use the "
            "global generators of PyTorch, NumPy or Python"
        )
        return bool(abs(one) > 32 * abs(many))

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
        """A context for evaluations of the loss that train nothing."""
        with metrics_restored(self), self.passes.paused(), self.compute_loss_context_manager():
            yield
