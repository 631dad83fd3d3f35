"""The arguments of `MixTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

from transformers.hf_argparser import HfArg

from hyperopt_peft.hypergradients import Estimator, get_estimator
from hyperopt_peft.problems.head_mix import RATE, SEARCH_STEPS
from hyperopt_peft.problems.two_phases import TwoPhaseTrainingArguments

#: The name of the default search, and of the default estimator.
AUTO = "auto"
#: The default estimator where each token has a label, as in a language model, and else.
OF_TOKENS, OF_ROWS = "darts:product=dots", "minres:steps=3,damping=0.1"
#: The updates of the weights in a search on a head of texts, whose weights take longer to settle.
STEPS_OF_TEXTS = 30


@dataclass
class MixTrainingArguments(TwoPhaseTrainingArguments):
    """The arguments of `MixTrainer`.

    Example:
        >>> MixTrainingArguments("outputs", report_to="none").retrain
        'scratch'
    """

    retrain: Literal["none", "warm", "scratch"] = HfArg(
        default="scratch",
        help="after the search, train on all rows with the learned weights: not at all, from where "
        "the search ended, or from the initial values",
    )
    search: Literal["auto", "head", "adapter"] = HfArg(
        default=AUTO,
        help="what the weights are learned on: a linear head on the features of the frozen model, "
        f"in seconds, of texts in minutes, or the adapter; {AUTO} is the head, and of a model in "
        "shards (FSDP) the adapter",
    )
    search_steps: int | None = HfArg(
        default=None,
        help=f"updates of the weights in a search on the head; {SEARCH_STEPS} if not given, "
        f"{STEPS_OF_TEXTS} of texts",
    )
    hypergradient: str = HfArg(
        default=AUTO,
        help="of a search on the adapter, the hypergradient estimator, with options; "
        f"{AUTO} is {OF_TOKENS} where each token has a label, and else {OF_ROWS}",
    )
    lower_steps: int = HfArg(
        default=3, help="optimizer steps from one update of the weights to the next"
    )
    learning_rate: float = HfArg(
        default=1e-3, help="peak learning rate of the adapter; 2e-4 for a large language model"
    )
    upper_learning_rate: float = HfArg(
        default=RATE, help="peak learning rate of the logits of the weights"
    )
    upper_prior: float | None = HfArg(
        default=None,
        help="τ of the prior ½·τ·mean‖u − u0‖² of the K logits, which prevents overfitting the n "
        "trusted rows; K/(8·n) if not given, 0 for none",
    )
    gradient_accumulation_steps: int = HfArg(
        default=16,
        help="micro-batches a step of the search, which needs about ten rows of each source: 128 "
        "rows with the default batch size",
    )
    retrain_gradient_accumulation_steps: int | None = HfArg(
        default=1, help="micro-batches a step of the retraining"
    )
    retrain_steps: int | None = HfArg(
        default=None,
        help="steps of the retraining, in place of epochs; if not given those of max_steps, or, "
        "after a search on the adapter of max_steps, as many as read the same number of rows",
    )
    # The lower level reads a column that the model does not; the trainer removes all others.
    remove_unused_columns: bool | None = HfArg(default=False, help="must stay false here")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("be at least 1", lambda n: n >= 1, "search_steps")

    def for_retraining(self) -> Self:
        """As `TwoPhaseTrainingArguments.for_retraining`, by rows after a search on the adapter."""
        args = super().for_retraining()
        by_rows = self.search == "adapter" and self.retrain_epochs is self.retrain_steps is None
        if by_rows and self.max_steps > 0:
            batches = self.max_steps * self.gradient_accumulation_steps
            args.max_steps = math.ceil(batches / args.gradient_accumulation_steps)
        return args

    def epochs_of(self, rows: int) -> float:
        """The epochs of a training on ``rows`` rows.

        Example:
            >>> MixTrainingArguments(
            ...     "outputs", max_steps=6, report_to="none", use_cpu=True
            ... ).for_retraining().epochs_of(24)
            2.0
        """
        step = self.gradient_accumulation_steps * self.train_batch_size * self.world_size
        steps = self.steps_of(rows)
        return steps * step / rows if self.max_steps > 0 else float(self.num_train_epochs)

    def estimator(self, *, of_tokens: bool = False) -> Estimator:
        """As `BilevelTrainingArguments.estimator`; ``auto`` is the one of tokens, or of rows."""
        if self.hypergradient != AUTO:
            return super().estimator()
        return get_estimator(OF_TOKENS if of_tokens else OF_ROWS)
