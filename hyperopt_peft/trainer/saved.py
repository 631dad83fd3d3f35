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
#: The rows whose logits are compared.
ROWS = 4


def check_saved(trainer: Any, folder: Path) -> None:
    """Raise ProblemError unless PEFT loads the model of ``trainer`` from ``folder``.

    The logits of a batch may differ by rounding. Where they cannot be compared, a line is logged.
    """
    if trainer.method is None:
        return
    name = type(trainer.method).__name__
    try:
        if trainer.is_fsdp_enabled:
            raise NotCompared("its parameters are sharded")
        error, allowed = difference(trainer.model, folder, _inputs(trainer))
    except NotCompared as reason:
        logger.info(f"{folder}: the saved adapter is not compared with the model, since {reason}")
        return
    if not error <= allowed:
        raise ProblemError(
            f"{name}: PEFT loads another model from {folder} than the one that was trained (its "
            f"logits differ by {error:.2g} of their size); let finish or export fold all that the "
            "method adds into the adapter's own weights"
        )


def _inputs(trainer: Any) -> dict[str, Any]:
    """A few training rows as the model reads them; labels only for the input of a decoder."""
    rows, base = trainer.train_dataset, base_model(trainer.model)
    names = {*signature(type(base).forward).parameters}
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        names -= {"labels"}
    if not (has_length(rows) and hasattr(rows, "__getitem__")):
        raise NotCompared("the training rows are a stream")
    size = min(len(rows), trainer.args.per_device_train_batch_size, ROWS)
    try:
        (batch,) = batches_of(
            read_rows(trainer), trainer.data_collator, size, trainer.args.device, chosen=range(size)
        )
    except ProblemError as error:
        raise NotCompared(str(error)) from error
    return {k: x for k, x in batch.items() if k in names and isinstance(x, Tensor)}
