"""How the Trainer's loss of each micro-batch enters the loss of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import Trainer

from hyperopt_peft.core.labels import ITEMS, label_weights, labels_are_shifted
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import reshard
from hyperopt_peft.utils.restore import preserve_state

logger = logging.getLogger(__name__)


class LossRule:
    """The weights of micro-batches by their labels, as the loss of ``trainer`` needs them.

    Args:
        trainer: the trainer, with model and arguments.
        of_levels: whether the levels have losses of their own, which know no labels.
        custom: whether the trainer's class overrides ``compute_loss``.
    """

    def __init__(self, trainer: Trainer, *, of_levels: bool, custom: bool) -> None:
        self.trainer, self.of_levels, self.custom = trainer, of_levels, custom
        self._reads_items: bool | None = None
        self._compared = False

    def label_weights(self, batches: Sequence[Any]) -> list[dict[str, Tensor]]:
        """The entries that make the mean loss of ``batches`` the mean over their labels."""
        if self.of_levels or not batches:  # no batches: an epoch that was resumed at its end
            return [{} for _ in batches]
        return label_weights(
            batches,
            shifted=isinstance(batches[0], Mapping) and self._labels_are_shifted(batches[0]),
            items=True,
            across_processes=self.trainer.args.average_tokens_across_devices,
        )

    def _labels_are_shifted(self, batch: Mapping[str, Any]) -> bool:
        trainer = self.trainer
        try:
            with trainer.compute_loss_context_manager():
                return labels_are_shifted(trainer.model, send_to_device(batch, trainer.args.device))
        except ProblemError:
            if self.custom or trainer.compute_loss_func:  # the model may have no loss
                return False
            raise

    def reads_items(self, compute: Callable[..., Tensor], inputs: Mapping[str, Any]) -> bool:
        """Whether the model's loss depends on ``num_items_in_batch``; measured once.

        ``compute`` is the loss of ``inputs``, a batch, with that keyword.
        """
        if self.trainer.compute_loss_func:
            return True
        if self._reads_items is None:
            self._reads_items = self._differs(
                lambda items: compute(dict(inputs), num_items_in_batch=items)
            )
        return self._reads_items is not False

    def warn_of_sum(self, loss: Callable[[Any], Tensor], batch: Mapping[str, Any]) -> None:
        """Warn once where `transformers.Trainer` would train the sum of the micro-batches.

        The Trainer leaves the mean to a loss that is given the number of labels, and some losses
        ignore the number.
        """
        trainer = self.trainer
        leaves_mean = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func
        if self._compared or not leaves_mean:
            return
        self._compared = True
        with trainer.compute_loss_context_manager():
            reads = self._differs(lambda items: loss({**batch, ITEMS: items}))
        if reads is False:
            logger.warning(
                "gradient_accumulation_steps: the loss ignores num_items_in_batch, so that "
                "transformers.Trainer trains the sum of the micro-batches' losses, and this "
                "trainer their mean; a learning rate is not the same in both"
            )

    def _differs(self, loss: Callable[[Tensor], Tensor]) -> bool | None:
        """Whether ``loss`` depends on the number of items; None where it is 0."""
        values, device = [], self.trainer.args.device
        for items in (1, 2):
            with preserve_state((), [device]), torch.no_grad():
                values.append(loss(torch.tensor(items, device=device)))
        reshard(self.trainer.model)
        return bool(values[0] != values[1]) if values[0] else None
