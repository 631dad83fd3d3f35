"""Checks that a training has changed the logits and has left a plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.models import evaluating

#: The test rows whose logits `Method.finish` should not change.
ROWS = 8
#: How many logits of a batch are compared: a language model has millions.
ENTRIES = 100_000


class Watch:
    """Watches the training of the method ``name`` by ``trainer``, which has not begun.

    ``change`` is the largest change of a logit by ``finish``, relative to the largest logit.
    """

    def __init__(self, trainer: Any, name: str) -> None:
        self.trainer, self.name, self.change = trainer, name, 0.0
        self.finish = trainer.method.finish
        vars(trainer.method)["finish"] = self._finish
        self.before = self._logits(trainer.model)

    def _finish(self, model: Any) -> Any:
        first = self._logits(model)
        model = self.finish(model)
        second = self._logits(model)
        largest = float(first.abs().max())
        self.change = float((second - first).abs().max()) / largest if largest else 0.0
        return model

    def _logits(self, model: Any) -> Tensor:
        rows = self.trainer.eval_dataset
        loader = self.trainer.get_eval_dataloader(rows.select(range(min(len(rows), ROWS))))
        with torch.no_grad(), evaluating(model):
            batches = (without(batch, self.trainer.tags) for batch in loader)
            outputs = [model(**batch) for batch in batches]
        # TRL's SFTTrainer before 1.15 has the loss alone.
        read = [x.loss if x.logits is None else x.logits for x in outputs]
        return torch.cat([each.flatten()[:ENTRIES] for each in read]).float()

    def check(self) -> None:
        """Raise ProblemError where no logit has changed, or a parametrisation is left."""
        model = (self.trainer.retrainer or self.trainer).model
        if torch.equal(self._logits(model), self.before):
            raise ProblemError(
                f"{self.name}: the training has changed no logit; let a loss read its variables, "
                "and finish keep what they learned"
            )
        for place, module in model.named_modules():
            if hasattr(module, "parametrizations"):
                raise ProblemError(
                    f"{self.name}: finish leaves a parametrisation at {place}, without which the "
                    "saved adapter is another one; remove it by "
                    "torch.nn.utils.parametrize.remove_parametrizations"
                )
