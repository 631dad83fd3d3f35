"""The model, the data and the trainer of the commands that train."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from hyperopt_peft.cli.text import models
from hyperopt_peft.cli.text.data import DataArguments, hold_out, load, require_repeated, weights_of
from hyperopt_peft.cli.text.encode import Encoder, class_names
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.tasks import TASKS, Task
from hyperopt_peft.core.labels import row_losses, weighted_mean
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems import AdapterTrainer, BiDoRATrainer, BiDoRATrainingArguments
from hyperopt_peft.trainer.data import shared
from hyperopt_peft.trainer.trainer import BilevelTrainer

logger = logging.get_logger(__name__)
WEIGHTS = "row_weight"


@dataclass
class MethodArguments(BiDoRATrainingArguments):
    """The training method, and its settings."""

    method: Literal["bidora", "dora", "lora"] = HfArg(
        default="bidora",
        help="bidora, or a baseline that trains all of the adapter on all of the data: dora, lora",
    )


TYPES = (ModelArguments, DataArguments, MethodArguments)


class WeightedTrainer(BilevelTrainer):
    """Trains Σ v_i s_i / Σ c_i: the summed loss s_i of row i times the row's weight, by labels c_i.

    A batch without weights, of an evaluation, has the loss of the model.
    """

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The weighted loss; all rows of a step have weights, or none."""
        weights = inputs.pop(WEIGHTS, None)
        if weights is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return weighted_mean(weights, *row_losses(model, inputs))


class WeightedBiDoRA(WeightedTrainer, BiDoRATrainer):
    """`BiDoRATrainer` with a weight for each row."""


class WeightedAdapter(WeightedTrainer, AdapterTrainer):
    """`AdapterTrainer` with a weight for each row."""


@dataclass(frozen=True)
class Setup:
    """The encoded data, and the construction of models and trainers for the data.

    Attributes:
        args: the options of the model.
        task: the task.
        config: the base model's configuration, with the head of the task.
        tokenizer: the base model's tokenizer.
        train: the encoded training examples of both levels.
        evaluation: the encoded evaluation examples, or None.
        source: the training and the evaluation examples as they were read, before a part of the
            training examples is held out.
        encoder: encodes further examples.
    """

    args: ModelArguments
    task: Task
    config: Any
    tokenizer: Any
    train: Dataset
    evaluation: Dataset | None
    source: tuple[Dataset, Dataset | None]
    encoder: Encoder

    def model(self, seed: int, *, dora: bool) -> Any:
        """A new PeftModel, a function of ``seed``; a warning names random frozen weights."""
        set_seed(seed)
        base, new = models.load_base(self.task, self.args.model, self.config, self.args.dtype)
        if getattr(base.config, "pad_token_id", None) is None:
            base.config.pad_token_id = self.tokenizer.pad_token_id
        model = models.adapted(base, self.args, self.task, dora=dora)
        if names := models.untrained(model, new):
            logger.warning_once(
                f"{', '.join(names)}: new, random and frozen; name their modules in modules_to_save"
            )
        return model

    def trainer(self, model: Any, args: MethodArguments, **options: Any) -> Any:
        """The trainer of ``model``.

        Raises:
            ProblemError: incompatible arguments.
        """
        train, evaluation, bidora = self.train, self.evaluation, args.method == "bidora"
        kind: Any = BiDoRATrainer if bidora else AdapterTrainer
        if WEIGHTS in train.column_names:
            # The Trainer would remove the weights, which the model does not take.
            kind = WeightedBiDoRA if bidora else WeightedAdapter
            args.remove_unused_columns = False
            taken = {*signature(model.get_base_model().forward).parameters, WEIGHTS}
            train = train.select_columns([name for name in train.column_names if name in taken])
            if evaluation is not None:
                unknown = [name for name in evaluation.column_names if name not in taken]
                evaluation = evaluation.remove_columns(unknown)
        try:
            return kind(
                model,
                args,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=self.tokenizer,
                data_collator=self.collator(model),
                compute_metrics=self.task.metrics,
                preprocess_logits_for_metrics=self.task.reduce,
                **options,
            )
        except ProblemError:
            raise
        # Of the Trainer: a logger that is not installed, or an unreachable hub, for example.
        except (ValueError, RuntimeError, OSError) as error:
            raise ProblemError(str(error)) from error

    def collator(self, model: Any) -> Any:
        """The collator that pads encoded examples to a batch, with what ``model`` reads."""
        if self.task.peft == "SEQ_CLS":
            return DataCollatorWithPadding(self.tokenizer)
        if self.task.peft == "TOKEN_CLS":
            return DataCollatorForTokenClassification(self.tokenizer)
        # A model that is given no labels, as for the losses of rows, needs the decoder's input.
        return DataCollatorForSeq2Seq(self.tokenizer, model)


def warn_of_shared(data: Dataset, what: str, other: Dataset, where: str) -> None:
    """Warn of examples that a model is evaluated on and has been trained on."""
    if common := shared(data, other):
        logger.warning(
            f"{common} of {len(data)} {what} are {where} too, so that the metrics are too good; "
            "remove them"
        )


def prepare(args: ModelArguments, data: DataArguments) -> Setup:
    """Read and encode the data for the model, without loading weights.

    Raises:
        ProblemError: invalid data, or a model that cannot be loaded.
    """
    task = TASKS[args.task]
    train, evaluation = source = load(data, args.task)
    tags = args.task == "token-classification"
    names = class_names(train, data.label_column, tags) if task.classes else ()
    config = models.labelled(models.load_config(args.model), args.task, names)
    name = args.tokenizer or args.model
    tokenizer = models.load_tokenizer(name, config, data.max_length, args.task)
    encoder = Encoder(args.task, data, tokenizer, names)
    weights = data.weight_column and weights_of(train, data.weight_column)
    train = encoder.encode(train, "the training examples")
    if weights:
        train = train.add_column(WEIGHTS, weights)
    if evaluation is not None:
        evaluation = encoder.encode(evaluation, "the evaluation examples")
        warn_of_shared(evaluation, "evaluation examples", train, "training examples")
    held_out = evaluation is None and data.eval_fraction > 0
    if args.task == "text-classification":
        require_repeated(train, held_out)
    if held_out:
        train, evaluation = hold_out(train, data.eval_fraction)
    return Setup(args, task, config, tokenizer, train, evaluation, source, encoder)
