"""How the Trainer's loss of each micro-batch enters the loss of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hyperopt_peft.core.labels import (
    ITEMS,
    MICRO_BATCHES,
    label_weights,
    labels_are_shifted,
)
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.distributed import reshard
from hyperopt_peft.utils.restore import preserve_state

logger = logging.getLogger(__name__)


class LossRule:
    """Makes the mean of the micro-batches' losses the loss that a Trainer trains.

    A loss that reads the number of labels in its step is divided by that number. The losses of
    others are weighted by their labels, unless the Trainer's class says that the mean of the
    micro-batches counts.

    Args:
        model: the model.
        loss: the loss of a batch, which may have the entries that this class adds.
        context: a context in which the loss is evaluated, and the metrics of the Trainer restored.
        device: the device of the batches.
        scaled: what the Trainer's class says: its loss is one of the whole step (True), of each
            micro-batch (False), or whichever the loss itself shows (None).
        sums: whether the Trainer trains the sum of losses that have a number of labels.
        custom: whether the loss may be another than the model's, which may have none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        context: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
        *,
        scaled: bool | None,
        sums: bool,
        custom: bool,
    ) -> None:
        self.model, self.loss, self.context, self.device = model, loss, context, device
        self.sums, self.custom = sums, custom
        self.scaled, self._warned = scaled, False
        self._reads_items, self._model_reads_items = scaled, scaled

    def entries(
        self, batches: Sequence[Any], items: Any, across_processes: bool
    ) -> list[dict[str, Any]]:
        """The entries of the micro-batches ``batches`` of a step, see `core.labels`.

        The first call measures whether the loss reads the number of labels.

        Args:
            batches: the micro-batches of this process.
            items: the Trainer's count of the labels in the step, or None.
            across_processes: whether it is the count of all processes.
        """
        if self.scaled is False or not batches:  # none: an epoch that was resumed at its end
            return [{} for _ in batches]
        entries: list[dict[str, Any]] = label_weights(batches, shifted=self._shifted(batches[0]))
        if items is None and not self.scaled:
            return entries
        if items is not None and not across_processes:
            items = distributed.average(torch.as_tensor(items, dtype=torch.float32))
        of_step = {ITEMS: items, MICRO_BATCHES: len(batches)}
        if self._reads(batches[0]):
            return [{**entry, **of_step} for entry in entries]
        if len(batches) > 1 and self.sums and not self._warned:
            self._warned = True
            logger.warning(
                "gradient_accumulation_steps: the loss ignores num_items_in_batch, so that "
                "transformers.Trainer trains the sum of the micro-batches' losses, and this "
                "trainer their mean; a learning rate is not the same in both"
            )
        return entries

    def _shifted(self, batch: Any) -> bool:
        if not isinstance(batch, Mapping):
            return False
        try:
            with self.context():
                return labels_are_shifted(self.model, send_to_device(batch, self.device))
        except ProblemError:
            if self.custom:
                return False
            raise

    def _reads(self, batch: Any) -> bool:
        if self._reads_items is None:
            batch = send_to_device(batch, self.device)
            self._reads_items = self._differs(
                # Of a copy, since a model may mask its inputs in place, as Whisper does.
                lambda items: self.loss({**deepcopy(batch), ITEMS: items, MICRO_BATCHES: 1})
            )
        return self._reads_items is not False

    def model_reads_items(self, compute: Any, model: nn.Module, inputs: Any) -> bool:
        """Whether ``compute``, the parent's loss of ``inputs``, depends on the number of labels."""
        if self._model_reads_items is None:
            self._model_reads_items = self._differs(
                lambda items: compute(model, deepcopy(dict(inputs)), num_items_in_batch=items)
            )
        return self._model_reads_items is not False

    def _differs(self, loss: Callable[[Tensor], Tensor]) -> bool | None:
        """Whether ``loss`` of 1 and of 1024 labels differ; None, so far unknown, where it is 0.

        Each evaluation starts from one random state. Two of 1 label say by how much those differ
        that do not read the number: by rounding, or by random numbers that cannot be replayed.
        """
        values = []
        for number in (1, 1024, 1):
            with preserve_state((), [self.device]), torch.no_grad(), self.context():
                values.append(loss(torch.tensor(number, device=self.device)))
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
