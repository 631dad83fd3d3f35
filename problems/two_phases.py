"""The arguments of a search over both levels and of a retraining of the lower one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

from transformers.hf_argparser import HfArg

from hyperopt_peft.trainer.arguments import BilevelTrainingArguments


@dataclass
class TwoPhaseTrainingArguments(BilevelTrainingArguments):
    """The arguments of both phases; those of `BilevelTrainingArguments` are for the search.

    Example:
        >>> args = TwoPhaseTrainingArguments("outputs", retrain_steps=9, report_to="none")
        >>> args.for_retraining().max_steps
        9
    """

    retrain_learning_rate: float | None = HfArg(
        default=None, help="peak learning rate of the retraining; learning_rate if not given"
    )
    retrain_weight_decay: float | None = HfArg(
        default=None, help="weight decay of the retraining; weight_decay if not given"
    )
    retrain_epochs: float | None = HfArg(
        default=None, help="epochs of the retraining; num_train_epochs if not given"
    )
    retrain_steps: int | None = HfArg(
        default=None, help="steps of the retraining, in place of epochs; max_steps if not given"
    )
    retrain_gradient_accumulation_steps: int | None = HfArg(
        default=None,
        help="micro-batches a step of the retraining; gradient_accumulation_steps if not given",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = ["retrain_learning_rate", "retrain_weight_decay"]
        self._require("not be negative", lambda x: x >= 0, *rates)
        self._require("be positive", lambda x: x > 0, "retrain_epochs", "retrain_steps")
        self._require("be at least 1", lambda n: n >= 1, "retrain_gradient_accumulation_steps")

    def for_retraining(self) -> Self:
        """As `BilevelTrainingArguments.for_retraining`, with the options ``retrain_…``."""
        args = copy.copy(self)
        given: Any = self.retrain_arguments or {}
        changes = dict(given)
        for name, value in (
            ("num_train_epochs", self.retrain_epochs),
            ("max_steps", self.retrain_steps),
            ("learning_rate", self.retrain_learning_rate),
            ("weight_decay", self.retrain_weight_decay),
            ("gradient_accumulation_steps", self.retrain_gradient_accumulation_steps),
        ):
            if value is not None:
                changes[name] = value
        args.retrain_arguments = changes
        return super(TwoPhaseTrainingArguments, args).for_retraining()
