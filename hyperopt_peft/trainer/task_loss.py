"""The loss that a Trainer trains, as the loss of a level: a mean over all labels of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import Trainer

from hyperopt_peft.core.labels import (
    ITEMS,
    MICRO_BATCHES,
    counts_of_labels,
    label_weights,
    labels_are_shifted,
)
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.restore import preserve_state

logger = logging.getLogger(__name__)


@dataclass
class LossRule:
    """Makes the mean of a step's micro-batch losses the mean over all labels of the step.

    Micro-batches are weighted by their numbers of labels, unless the Trainer's class declares the
    plain mean (``loss_is_scaled_for_ga = False``). Whether the loss reads the step's number of
    labels is measured once.
    """

    args: Any
    scaled: bool | None  # the class's ``loss_is_scaled_for_ga``; None if it declares nothing
    own: bool  # whether the loss is another than the model's
    counts: bool  # whether the Trainer gives the loss the step's number of labels
    measuring: Callable[[], AbstractContextManager[Any]]  # for evaluations that train nothing

    @classmethod
    def of(cls, trainer: Any, stock: type[Trainer]) -> LossRule:
        """The rule of ``trainer``; an override of ``compute_loss`` in ``stock`` does not count."""
        function = trainer.compute_loss_func is not None
        classes = [x for x in type(trainer).__mro__ if x not in (stock, Trainer)]
        return cls(
            trainer.args,
            scaled=getattr(trainer, "loss_is_scaled_for_ga", None),  # None until Transformers 5.19
            own=function or any("compute_loss" in vars(x) for x in classes),
            counts=function or trainer.model_accepts_loss_kwargs,
            measuring=trainer.measuring,
        )

    def __post_init__(self) -> None:
        #: Whether the Trainer's loss, and the model's, read the count; None if not yet known.
        self._reads_count: dict[str, bool | None] = {"trainer": self.scaled, "model": self.scaled}
        self._warned = False

    def entries(
        self, batches: Sequence[Any], model: Any, loss: Callable[[Any], Tensor]
    ) -> list[dict[str, Any]]:
        """The entries of `core.labels` for each of a step's micro-batches.

        ``loss`` is the Trainer's loss of a micro-batch with entries.
        """
        if self.scaled is False:
            return [{} for _ in batches]
        counts = counts_of_labels(batches, shifted=self._shifted(model, batches[0]))
        entries: list[dict[str, Any]] = [{} for _ in batches]
        if counts is not None:
            entries = [*label_weights(counts)]
        items = self._items(counts)
        if items is not None or self.scaled:
            if self._reads(batches[0], model, loss):
                of_step = {ITEMS: items, MICRO_BATCHES: len(batches)}
                return [{**entry, **of_step} for entry in entries]
            self._warn_of_sums(len(batches))
        return entries

    def _items(self, counts: Sequence[Tensor] | None) -> Tensor | None:
        """The number of labels of a step, by which a sum of losses is divided; None for a mean.

        The Trainer's own count has the first label of a causal model's rows before Transformers
        5.10, and misses that of a sequence-to-sequence model's rows before 5.15.
        """
        if not self.counts or counts is None:
            return None
        items = distributed.average(torch.stack([*counts]).sum().float().to(self.args.device))
        # With this argument the Trainer multiplies the loss by the number of processes.
        together = self.args.average_tokens_across_devices
        return (items * distributed.world_size()).round() if together else items

    def _warn_of_sums(self, count: int) -> None:
        sums = (self.own or self.counts) and self.args.gradient_accumulation_steps > 1
        if count > 1 and sums and not self._warned:
            self._warned = True
            logger.warning(
                "gradient_accumulation_steps: the loss ignores num_items_in_batch, so "
                "transformers.Trainer trains the sum of the micro-batches' losses, this trainer "
                "their mean; choose the learning rate for the mean"
            )

    def _shifted(self, model: Any, batch: Any) -> bool:
        if not isinstance(batch, Mapping):
            return False
        try:
            with self.measuring():
                return labels_are_shifted(model, send_to_device(batch, self.args.device))
        except ProblemError:
            if self.own:  # the model may have no loss
                return False
            raise

    def _reads(self, batch: Any, model: Any, loss: Callable[[Any], Tensor]) -> bool:
        # A copy, since some models, such as Whisper, mask their inputs in place.
        of_count = lambda n: loss(  # noqa: E731
            {**deepcopy(send_to_device(batch, self.args.device)), ITEMS: n, MICRO_BATCHES: 1}
        )
        return not self.ignores_count(model, of_count, "trainer")

    def ignores_count(self, model: Any, loss: Callable[[Tensor], Tensor], of: str) -> bool:
        """Whether ``loss``, a function of the number of labels, ignores it; ``of`` names it."""
        if self._reads_count[of] is None:
            device = self.args.device
            self._reads_count[of] = depends_on_count(loss, model, device, self.measuring)
        return self._reads_count[of] is False


def depends_on_count(
    loss: Callable[[Tensor], Tensor],
    model: Any,
    device: torch.device,
    measuring: Callable[[], AbstractContextManager[Any]],
) -> bool | None:
    """Whether ``loss`` differs for 1 and 1024 labels; None (not yet known) if it is 0.

    All evaluations start from the same random state, inside of ``measuring()``. A second evaluation
    with 1 label measures the noise: rounding, or random numbers that cannot be replayed.
    """
    values = []
    for number in (1, 1024, 1):
        with preserve_state((), [device]), torch.no_grad(), measuring():
            values.append(loss(torch.tensor(number, device=device)))
    distributed.reshard(model)
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
