"""The model, the data and the trainer of the commands that train."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from hyperopt_peft.cli.text.data import (
    EVALUATION,
    TRAIN,
    DataArguments,
    hold_out,
    read_files,
    require_columns,
    weights_of,
)
from hyperopt_peft.cli.text.encode import Encoder, class_names
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.tasks import TASKS, Task
from hyperopt_peft.core.labels import row_losses, weighted_mean
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems import BiDoRA, DoRA, LoRA
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.data import shared
from hyperopt_peft.trainer.trainer import BilevelTrainer

logger = logging.get_logger(__name__)
WEIGHTS = "row_weight"
Method = Literal["bidora", "dora", "lora"]


@dataclass
class MethodArguments(BilevelTrainingArguments):
    """The training method, and its settings."""

    method: Method = HfArg(
        default="bidora",
        help="bidora, or a baseline that trains all of the adapter on all of the data: dora, lora",
    )
    hypergradient: str = HfArg(
        default="direct",
        help="hypergradient estimator, with options: minres:steps=5,damping=1.0",
    )
    lower_steps: int = HfArg(
        default=4, help="optimizer steps from one update of the magnitudes to the next"
    )
    gamma: float = HfArg(
        default=0.0, help="weight of the Gram regulariser; the published recipes have 1e-5"
    )
    norm_grad: Literal["full", "detach"] = HfArg(
        default="full",
        help="whether the row norm is in the graph; detach is PEFT's approximation",
    )
    fast_dora: bool = HfArg(
        default=True, help="whether linear layers run the fast forward pass instead of PEFT's"
    )
    logging_steps: float = HfArg(
        default=0.05, help="steps between two logs; below 1 a share of all steps"
    )

    def make_method(self) -> Any:
        """The method with the options."""
        if self.method == "bidora":
            return BiDoRA(self.gamma, self.norm_grad, self.fast_dora)
        return LoRA() if self.method == "lora" else DoRA(self.fast_dora)


#: The options of the commands that train on files.
SHARED = (ModelArguments, DataArguments, MethodArguments)


class RowWeights(BilevelTrainer):
    """Trains Σ v_i s_i / Σ c_i: the summed loss s_i of row i times the row's weight, by labels c_i.

    A batch without weights, of an evaluation, has the loss of the model.

    Raises:
        ProblemError: the model's own loss is no mean over labels that can be split by rows.
    """

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The weighted loss; all rows of a step have weights, or none."""
        weights = inputs.pop(WEIGHTS, None)
        if weights is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return weighted_mean(weights, *row_losses(model, inputs))


@dataclass(frozen=True)
class Setup:
    """The encoded data, and the construction of models and trainers for the data.

    Attributes:
        args: the options of the model.
        task: the task.
        config: the base model's configuration, with the head of the task.
        encoder: encodes further examples; has the tokenizer.
        train, evaluation: the encoded examples, of both levels and held out from them, or None.
        rows, evaluation_rows: as they were read, before a part of ``rows`` is held out.
    """

    args: ModelArguments
    task: Task
    config: Any
    encoder: Any
    train: Dataset
    evaluation: Dataset | None
    rows: Dataset
    evaluation_rows: Dataset | None

    def read(self, paths: Sequence[str], option: str) -> Dataset:
        """The encoded examples of further files, those of ``option``."""
        rows, where = read_files(paths, option), f"the {option.removesuffix('_file')} examples"
        return self.encoder.encode(rows, where)

    def model(self, seed: int, *, dora: bool) -> Any:
        """A new PeftModel, a function of ``seed``; a warning names random frozen weights."""
        set_seed(seed)
        args = self.args
        base, new = models.load_base(
            self.task, args.model, self.config, args.dtype, four_bits=args.load_in_4bit
        )
        if getattr(base.config, "pad_token_id", None) is None:
            base.config.pad_token_id = self.encoder.tokenizer.pad_token_id
        model = models.add_adapter(base, args, self.task, dora=dora)
        named = model.get_base_model().named_parameters()
        frozen = {name.replace(".base_layer.", ".") for name, p in named if not p.requires_grad}
        if names := [name for name in new if name in frozen]:
            logger.warning_once(
                f"{', '.join(names)}: new, random and frozen; name their modules in modules_to_save"
            )
        return model

    def options(self, model: Any) -> dict[str, Any]:
        """The arguments of any trainer of ``model`` that follow from the task."""
        tokenizer = self.encoder.tokenizer
        if self.task.peft == "SEQ_CLS":
            collator: Any = DataCollatorWithPadding(tokenizer)
        elif self.task.peft == "TOKEN_CLS":
            collator = DataCollatorForTokenClassification(tokenizer)
        else:  # a model that is given no labels, as for the losses of rows, needs decoder inputs
            collator = DataCollatorForSeq2Seq(tokenizer, model)
        return {
            "processing_class": tokenizer,
            "data_collator": collator,
            "compute_metrics": self.task.metrics,
            "preprocess_logits_for_metrics": self.task.reduce,
        }

    def trainer(self, args: MethodArguments) -> Any:
        """The trainer of a new model, by ``args.method``."""
        model = self.model(args.seed, dora=args.method != "lora")
        train, evaluation = self.train, self.evaluation
        kind: Any = BilevelTrainer
        if WEIGHTS in train.column_names:
            # The Trainer would remove the weights, which the model does not take.
            kind = RowWeights
            args = changed(args, remove_unused_columns=False)
            names = {*signature(model.get_base_model().forward).parameters, WEIGHTS}
            train, evaluation = (
                rows and rows.select_columns([x for x in rows.column_names if x in names])
                for rows in (train, evaluation)
            )
        data = {"train_dataset": train, "eval_dataset": evaluation}
        with trainer_errors():
            return kind(model, args, method=args.make_method(), **data, **self.options(model))


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Turn a Trainer's errors, such as a logger that is not installed, into a ProblemError."""
    try:
        yield
    except ProblemError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise ProblemError(str(error)) from error


def prepare(args: ModelArguments, data: DataArguments) -> Setup:
    """Read and encode the data for the model, without loading weights.

    Raises:
        ProblemError: invalid data, or a model that cannot be loaded.
    """
    if args.task not in TASKS:
        raise ProblemError(f"task: {args.task} is of attribute; use causal-lm")
    task, columns = TASKS[args.task], data.columns(args.task)
    rows, evaluation_rows = data.read()
    require_columns(rows, columns, TRAIN)  # before the classes are read
    names = class_names(rows, data.label_column) if task.classes else ()
    config = models.labelled(models.load_config(args.model), args.task, names)
    name = args.tokenizer or args.model
    tokenizer = models.load_tokenizer(name, config, data.max_length, args.task)
    encoder = Encoder(args.task, data, tokenizer, names)
    train, evaluation = encoder.encode(rows, TRAIN), None
    if data.weight_column:
        train = train.add_column(WEIGHTS, weights_of(rows, data.weight_column))
    if evaluation_rows is not None:
        evaluation = encoder.encode(evaluation_rows, EVALUATION)
        warn_of_shared(evaluation, "evaluation examples", train, "training examples")
    elif data.eval_fraction:
        train, evaluation = hold_out(train, data.eval_fraction)
    return Setup(args, task, config, encoder, train, evaluation, rows, evaluation_rows)


def warn_of_shared(data: Dataset, what: str, other: Dataset, where: str) -> None:
    """Warn of examples that a model is evaluated on and has been trained on."""
    if common := shared(data, other):
        advice = "so that the metrics are too good; remove them"
        logger.warning(f"{common} of {len(data)} {what} are {where} too, {advice}")


def changed(args: Any, **values: Any) -> Any:
    """A copy of ``args`` with other values."""
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args
