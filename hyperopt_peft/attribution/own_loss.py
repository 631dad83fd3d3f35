"""Whether the loss of a trainer of a class such as TRL's is the mean over the labels of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hyperopt_peft.attribution.trainer_data import TrainerData
from hyperopt_peft.core.labels import TOLERANCE, row_losses, weighted_mean
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import batches_of
from hyperopt_peft.trainer.internals import metrics_restored
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.models import keep_differentiable
from hyperopt_peft.utils.random_state import RandomState, replay

OWN_LOSS = (
    "the trainer has a loss of its own, whose share of each row is not known; use attribute with a "
    "level of your own"
)


def has_own_loss(trainer: Trainer) -> bool:
    """Whether a class of ``trainer`` replaces `transformers.Trainer.compute_loss`."""
    kinds = [kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind)]
    return any(kind.__module__.partition(".")[0] != "hyperopt_peft" for kind in kinds[:-1])


@torch.no_grad()
def require_mean_over_labels(trainer: Any, data: TrainerData) -> None:
    """Raise ProblemError where the loss of the first batch is not the mean over its labels.

    No name decides: `transformers.Trainer.compute_loss`, as ``trainer`` overrides it, is compared
    with `row_losses`, without dropout. ``SFTTrainer`` with ``loss_type="nll"`` passes.
    """
    count = min(len(data.train_rows), trainer.args.per_device_train_batch_size)
    (batch,) = batches_of(
        data.train_rows, data.collate, count, trainer.args.device, chosen=range(count)
    )
    batch = without(batch, data.collate.tags)
    own = "has no labels"
    if isinstance(batch.get("labels"), Tensor):
        keep_differentiable(trainer.model)
        trainer.model.eval()
        with (
            replay(RandomState.capture()),
            metrics_restored(trainer),
            trainer.compute_loss_context_manager(),
        ):
            sums, counts = row_losses(trainer.model, batch)
            mean = weighted_mean(torch.ones_like(sums), sums, counts)
            loss = trainer.compute_loss(trainer.model, {**batch})  # which may add entries
        if (loss - mean).abs() <= TOLERANCE * mean.abs():
            return
        own = f"has the loss {float(loss):.4g}, and the mean over its labels is {float(mean):.4g}"
    raise ProblemError(f"training: the first batch of {type(trainer).__name__} {own}: {OWN_LOSS}")
