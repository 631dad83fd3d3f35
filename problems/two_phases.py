"""`TwoPhaseTrainer`: a search over both levels, then a retraining of the lower one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

from transformers.hf_argparser import HfArg

from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.phases import as_prepared
from hyperopt_peft.trainer.phases import options_of_retraining as options_of_retraining
from hyperopt_peft.trainer.trainer import BilevelTrainer


@dataclass
class TwoPhaseTrainingArguments(BilevelTrainingArguments):
    """The arguments of `TwoPhaseTrainer`; those of `BilevelTrainingArguments` are for the search.

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


class TwoPhaseTrainer(BilevelTrainer):
    """A search over both levels, then a retraining of the lower one with the upper one frozen.

    The base of `BiDoRATrainer`. The retraining has its own trainer,
    ``retrainer``, with its own ``state.log_history``; a subclass makes it in ``retraining``.

    Args:
        trainer: the arguments of `BilevelTrainer`; ``args`` are `TwoPhaseTrainingArguments`.

    Raises:
        ProblemError: as `BilevelTrainer`.

    Example:
        >>> class Search(TwoPhaseTrainer):
        ...     def retraining(self, args):
        ...         level = {"lower": self.lower, "upper": None}
        ...         data = {"train_dataset": self.train_dataset}
        ...         return self.trainer_of(BilevelTrainer, args, **level, **data)
        >>> Search.retrainer is None  # until `train` has made it
        True
    """

    Arguments = TwoPhaseTrainingArguments
    args: TwoPhaseTrainingArguments

    @property
    def has_second_phase(self) -> bool:
        """Whether ``retrain`` asks for one."""
        return self.args.retrain != "none"

    def retraining(self, args: Any) -> BilevelTrainer:
        """The trainer of the second phase, with the arguments ``args``; a subclass makes it."""
        raise NotImplementedError

    def trainer_of(self, kind: type[BilevelTrainer], args: Any, **options: Any) -> Any:
        """A further trainer of this one's model, of the class ``kind`` over the same parent.

        Args:
            kind: the class, before it is made over the parent.
            args: the settings.
            options: further arguments of the class, see `options_of_retraining`; data are as this
                trainer was given them.
        """
        made = kind.over(self.parent())
        with as_prepared(self.model):
            return made(self.model, args=args, processing_class=self.processing_class, **options)
