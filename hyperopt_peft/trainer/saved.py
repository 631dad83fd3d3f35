"""Compares the adapter that a trainer has saved with the model that it has trained."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hyperopt_peft.adapters.saved import NotCompared, difference
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import read_rows
from hyperopt_peft.trainer.data import batches_of
from hyperopt_peft.utils.models import base_model

logger = logging.get_logger(__name__)
#: The most rows whose logits are compared.
ROWS = 4


def check_saved(trainer: Any, folder: Path) -> None:
    """Raise ProblemError unless PEFT loads the model of ``trainer`` from ``folder``.

    The logits of a few rows may differ by rounding. If they cannot be compared, a line is logged.
    """
    try:
        error, allowed = difference(trainer.model, folder, _inputs(trainer))
    except NotCompared as reason:
        logger.info(f"{folder}: the saved adapter is not compared with the model, since {reason}")
        return
    if not error <= allowed:
        raise ProblemError(
            f"{type(trainer.method).__name__}: PEFT loads another model from {folder} than the one "
            f"that was trained (its logits differ by {error:.2g} of their size); let finish or "
            "export fold all that the method adds into the adapter's own weights"
        )


def _inputs(trainer: Any) -> dict[str, Any]:
    """A few training rows as the model reads them; labels only for the input of a decoder."""
    rows, base, device = trainer.train_dataset, base_model(trainer.model), trainer.args.device
    if trainer.is_fsdp_enabled or not (has_length(rows) and hasattr(rows, "__getitem__")):
        raise NotCompared("the model is sharded, or the training rows are a stream")
    few = range(min(len(rows), trainer.args.per_device_train_batch_size, ROWS))
    try:
        (batch,) = batches_of(read_rows(trainer), trainer.data_collator, ROWS, device, chosen=few)
    except ProblemError as error:
        raise NotCompared(str(error)) from error
    names = {*signature(type(base).forward).parameters}
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        names -= {"labels"}
    return {k: x for k, x in batch.items() if k in names and isinstance(x, Tensor)}
