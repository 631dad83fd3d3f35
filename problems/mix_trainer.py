"""`MixTrainer`: how much should each source of training data count?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

from datasets import Dataset
from torch import Tensor
from transformers.hf_argparser import HfArg

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import trainable
from hyperopt_peft.problems.data_sources import SOURCE, VOTES, Mixture, SourceWeights
from hyperopt_peft.problems.example_weights import HeldOut
from hyperopt_peft.problems.source_data import SourceData
from hyperopt_peft.problems.two_phases import (
    TwoPhaseTrainer,
    TwoPhaseTrainingArguments,
    options_of_retraining,
)
from hyperopt_peft.trainer.checks import check_class
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.models import base_model


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
        default="minres:steps=3,damping=0.1",
        help="hypergradient estimator, with options: darts:xi=1.0 is cheaper",
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


class MixTrainer(TwoPhaseTrainer):
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

    Args:
        model: a PeftModel for classification or language modelling.
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
        if not isinstance(sources, SourceData):
            sources = SourceData.of(sources, trusted)
        columns = {*signature(base_model(model).forward).parameters, "label", "label_ids"}
        self.data = sources.of_columns({*columns, SOURCE, VOTES})
        self.weights = SourceWeights(self.data.counts).to(args.device)
        #: The arguments of `transformers.Trainer` for further trainers of the same model.
        self.options = options_of_retraining(trainer)
        #: The initial values of the trainable parameters.
        self.initial = [parameter.detach().clone() for _, parameter in trainable(model)]
        super().__init__(
            model=model,
            lower=self._lower,
            upper=self._upper,
            args=args,
            train_dataset=self.data.everything,
            upper_dataset=self.data.trusted,
            **trainer,
        )

    def _lower(self, trainer: BilevelTrainer) -> Problem:
        return Mixture(trainer.model, self.weights)

    def _upper(self, trainer: BilevelTrainer) -> Problem:
        prior = len(self.weights.names) / (8 * len(self.data.trusted))
        # The argument, where there is one, becomes the level's prior afterwards.
        is_default = trainer.args.upper_prior is None
        return HeldOut(trainer.model, self.weights, prior=prior if is_default else None)

    def retraining(self, args: Any) -> BilevelTrainer:
        """The trainer of the adapter on everything, with the learned weights."""
        return BilevelTrainer(
            self.model,
            lower=self._lower,
            upper=None,
            args=args,
            train_dataset=self.data.everything,
            **self.options,
        )

    def search_passes(self) -> int:
        """The forward+backward passes of the search, in passes over a micro-batch."""
        steps = self.args.steps_of(len(self.data.everything))
        return math.ceil(steps * self.passes_of_an_upper_step() / self.args.lower_steps)

    def shares(self) -> dict[str, float]:
        """The share of each source, and of the trusted rows, in the training loss; sum 1."""
        return self._by_name(self.weights.shares())

    def row_weights(self) -> dict[str, float]:
        """The weight of a row of each source, by name; the mean over all rows is 1."""
        return self._by_name(self.weights())

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.weights.names, values.tolist(), strict=True))
