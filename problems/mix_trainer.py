"""`MixTrainer`: how much should each source of training data count?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from torch import Tensor
from transformers.hf_argparser import HfArg

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients import Estimator, get_estimator
from hyperopt_peft.problems.common import trainable
from hyperopt_peft.problems.data_sources import SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut
from hyperopt_peft.problems.source_data import SourceData
from hyperopt_peft.problems.source_trainer import SourceTrainer, equal_weights
from hyperopt_peft.problems.two_phases import (
    TwoPhaseTrainer,
    TwoPhaseTrainingArguments,
    options_of_retraining,
)
from hyperopt_peft.trainer.checks import check_class
from hyperopt_peft.trainer.trainer import BilevelTrainer

#: The name of the default estimator.
AUTO = "auto"
#: Its values where each token has a label, as in a language model, and else.
OF_TOKENS, OF_ROWS = "darts:product=dots", "minres:steps=3,damping=0.1"


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
    hypergradient: str = HfArg(
        default=AUTO,
        help=f"hypergradient estimator, with options; {AUTO} is {OF_TOKENS} where each token has a "
        f"label, as in a language model, and else {OF_ROWS}",
    )
    lower_steps: int = HfArg(
        default=3, help="optimizer steps from one update of the weights to the next"
    )
    upper_learning_rate: float = HfArg(
        default=0.6, help="peak learning rate of the logits of the weights"
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
    # The lower level reads a column that the model does not; the trainer removes all others.
    remove_unused_columns: bool | None = HfArg(default=False, help="must stay false here")

    def estimator(self, *, of_tokens: bool = False) -> Estimator:
        """As `BilevelTrainingArguments.estimator`; ``auto`` is the one of tokens, or of rows."""
        if self.hypergradient != AUTO:
            return super().estimator()
        return get_estimator(OF_TOKENS if of_tokens else OF_ROWS)


class MixTrainer(SourceTrainer, TwoPhaseTrainer):
    """Learns the weights of data sources on trusted rows, then trains on everything with them.

    In the search the lower level trains the adapter on the sources (`Mixture`), and the upper level
    the weights on the trusted rows (`HeldOut`). The trusted rows are one more source of the lower
    level, ``trusted``, whose weight is learned as well. Then the adapter is trained from its
    initial values on sources and trusted rows. ``weights`` has the result; `compare_baselines` says
    whether it was worth it.

    The default prior makes n·(F + prior), with F the mean loss of n trusted rows, a negative log
    posterior whose logits have the prior variance 8.

    The hypergradient needs about ten rows of each source in a step of the search: see
    ``gradient_accumulation_steps``. Where the logged ``upper_snr`` is near 0 from the beginning,
    the weights follow noise.

    Of a language model each label has a source, and f is the mean over all labels: the loss that
    the parent trains where all weights are 1. ``MixTrainer.over(SFTTrainer)`` takes texts, which
    SFTTrainer prepares, each source alone; a packed row has one source.

    Args:
        model: a PeftModel for classification or language modelling, or what the parent takes.
        args: the settings.
        sources: data sets by name; or one data set with the column ``votes``, a list of a class
            for each labelling function, -1 for none.
        trusted: the trusted rows, with the columns of the sources; of votes, with labels.
        trainer: further arguments of `transformers.Trainer`.

    Raises:
        ProblemError: as `SourceData.of` and `BilevelTrainer`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = get_peft_model(BertForSequenceClassification(tiny), LoraConfig())
        >>> def rows(first):
        ...     ids = [[first + k] * 4 for k in range(6)]
        ...     return Dataset.from_dict({"input_ids": ids, "labels": [0, 1] * 3})
        >>> args = MixTrainingArguments("outputs", report_to="none", use_cpu=True)
        >>> trainer = MixTrainer(
        ...     model, args, sources={"web": rows(1), "books": rows(10)}, trusted=rows(20)
        ... )
        >>> trainer.weights.names
        ['web', 'books', 'trusted']
    """

    Arguments = MixTrainingArguments
    args: MixTrainingArguments
    may_share_rows = True

    def __init__(
        self,
        model: Any,
        args: MixTrainingArguments,
        *,
        sources: Mapping[str, Dataset] | Dataset | SourceData,
        trusted: Dataset | None = None,
        **trainer: Any,
    ) -> None:
        check_class(args, self.Arguments)
        for name, value in (
            ("label_smoothing_factor", args.label_smoothing_factor),
            ("compute_loss_func", trainer.get("compute_loss_func")),
        ):
            if value:
                raise ProblemError(
                    f"{name}: not possible in MixTrainer, whose levels have a loss of each row; "
                    "leave it out"
                )
        #: The sources and the trusted rows as they were given.
        self.data = sources if isinstance(sources, SourceData) else SourceData.of(sources, trusted)
        #: The arguments of the parent for further trainers of the same model.
        self.options = options_of_retraining(trainer)
        super().__init__(
            model,
            args,
            parts=self.data.parts,
            names=self.data.names,
            upper=MixTrainer._held_out,
            **trainer,
        )
        #: The initial values of the trainable parameters.
        self.initial = [parameter.detach().clone() for _, parameter in trainable(self.model)]

    def _held_out(self) -> Problem:
        prior = len(self.weights.names) / (8 * len(self.data.trusted))
        # The argument, where there is one, becomes the level's prior afterwards.
        default = prior if self.args.upper_prior is None else None
        return HeldOut(self.model, self.weights, task_loss=self.task_loss, prior=default)

    def make_estimator(self) -> Estimator:
        """As `BilevelTrainer.make_estimator`; by default the one for tokens, or for rows."""
        return self.args.estimator(of_tokens=self.of_tokens)

    def retraining(self, args: Any) -> BilevelTrainer:
        """The trainer of the adapter on everything, with the learned weights."""
        return self.of_parts(self.data.parts, args, lambda counts: self.weights, **self.options)

    def of_parts(
        self,
        parts: Mapping[str, Dataset],
        args: Any,
        weights: Callable[[Mapping[str, int]], SourceWeights] = equal_weights,
        **options: Any,
    ) -> SourceTrainer:
        """A trainer of the same kind that trains the model on ``parts``, with fixed weights."""
        of_parts = {"parts": parts, "names": self.data.names, "weights": weights}
        made: SourceTrainer = self.trainer_of(SourceTrainer, args, **of_parts, **options)
        return made

    def search_passes(self) -> int:
        """The forward+backward passes of the search, in passes over a micro-batch."""
        steps = self.args.steps_of(len(self.train_dataset))
        return math.ceil(steps * self.passes_of_an_upper_step() / self.args.lower_steps)

    def shares(self) -> dict[str, float]:
        """The share of each source, and of the trusted rows, in the training loss; sum 1."""
        return self._by_name(self.weights.shares())

    def row_weights(self) -> dict[str, float]:
        """The weight of a row of each source, by name; the mean over all rows is 1."""
        return self._by_name(self.weights())

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.weights.names, values.tolist(), strict=True))
