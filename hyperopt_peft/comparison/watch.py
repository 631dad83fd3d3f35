"""Checks that a training has changed the logits and has left a plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.models import evaluating

#: How many test rows are read, and how many logits of a batch: a language model has millions.
ROWS, ENTRIES = 8, 100_000


def logits_of(trainer: Any) -> Tensor:
    """Logits of a few test rows, by the model of the last phase of ``trainer``."""
    model, rows = (trainer.retrainer or trainer).model, trainer.eval_dataset
    loader = trainer.get_eval_dataloader(rows.select(range(min(len(rows), ROWS))))
    with torch.no_grad(), evaluating(model):
        outputs = [model(**without(batch, trainer.tags)) for batch in loader]
    # TRL's SFTTrainer before 1.15 has the loss alone.
    read = [x.loss if x.logits is None else x.logits for x in outputs]
    return torch.cat([each.flatten()[:ENTRIES] for each in read]).float()


def check_trained(trainer: Any, name: str, before: Tensor) -> None:
    """Raise ProblemError where no logit has changed, or the method ``name`` left no plain model.

    ``before`` are the logits before the training.
    """
    if torch.equal(logits_of(trainer), before):
        raise ProblemError(
            f"{name}: the training has changed no logit; let a loss read its variables, and "
            "finish keep what they learned"
        )
    for place, module in (trainer.retrainer or trainer).model.named_modules():
        if hasattr(module, "parametrizations"):
            raise ProblemError(
                f"{name}: finish leaves a parametrisation at {place}, without which the saved "
                "adapter is another one; remove it by "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
