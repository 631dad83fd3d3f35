"""Options, data, model and trainer for the commands that train."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, set_seed
from transformers.utils import logging

from hyperopt_peft.cli.options import Options, OutputArguments, checkpoint_of, divided, parse
from hyperopt_peft.cli.text import attributed, models
from hyperopt_peft.cli.text.attributed import ROW
from hyperopt_peft.cli.text.data import (
    EVALUATION,
    TRAIN,
    UPPER,
    DataArguments,
    ExampleData,
    held_out,
    require_columns,
)
from hyperopt_peft.cli.text.encode import Encoder, class_names, warn_of_one_class
from hyperopt_peft.cli.text.models import ModelArguments
from hyperopt_peft.cli.text.sft import Conversations, sft_trainer
from hyperopt_peft.cli.text.tasks import SFT, TASKS, Task
from hyperopt_peft.comparison.find import find_method
from hyperopt_peft.errors import NonFiniteError, ProblemError
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.splits import shared_rows
from hyperopt_peft.trainer.tags import INDEX
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.types import Model

logger = logging.get_logger(__name__)
#: The options of every command that trains.
SHARED = (ModelArguments, DataArguments, BilevelTrainingArguments)


@dataclass
class Chosen:
    """The options of a run; ``options`` and the method's ``name`` are as the user gave them."""

    name: str
    options: Options
    command: Any
    model: ModelArguments
    data: Any
    args: Any
    method: Method


def choose(
    name: str,
    kind: type[OutputArguments],
    argv: Sequence[str],
    method: str = "",
    besides: Collection[str] = (),
) -> Chosen:
    """The options in ``argv`` for the command ``name``, whose own options are ``kind``'s fields.

    ``method`` replaces the option ``method``; names in ``besides`` are ignored.
    """
    given, _ = divided(name, argv)
    if not method:
        default = str(kind.__dataclass_fields__["method"].default)
        method = (given.get("method") or [default])[-1]
    types: tuple[Any, ...] = SHARED
    if given.get("task") == [SFT]:
        types = (ModelArguments, ExampleData, sft_trainer().Arguments)
    found = find_method(method)
    parsed, options = parse(name, (kind, *types), argv, method=found, besides=besides)
    chosen = Chosen(method, options, *parsed)
    if name != "train" and checkpoint_of(chosen.args):
        raise ProblemError("resume_from_checkpoint: this command does not resume; leave it out")
    return chosen


@dataclass(frozen=True)
class Setup:
    """The encoded data, and the construction of models and trainers for the data.

    Attributes:
        rows, upper_rows, evaluation_rows: as they were read, a held-out part as well.
        scored_on: digests of the rows that scored the training rows; see `attributed`.
        same_text: by each row whose text has another label too, the first row of the text.
        changed: how many labels the corrections change; None without corrections.
    """

    args: ModelArguments
    task: Task
    config: Any
    encoder: Any
    train: Dataset
    upper: Dataset | None
    evaluation: Dataset | None
    rows: Dataset
    upper_rows: Dataset | None
    evaluation_rows: Dataset | None
    scored_on: set[str]
    same_text: dict[int, int]
    changed: int | None

    def scored_by(self, rows: Dataset | None) -> int:
        """How many of ``rows``, such as the evaluation rows, have scored the training rows."""
        digests = [] if rows is None else attributed.digests_of(rows, self.encoder.columns)
        return sum(digest in self.scored_on for digest in digests)

    def base(self) -> tuple[Any, list[str]]:
        """A new model without an adapter, and the names of its new weights."""
        base, new = models.load_base(self.task, self.args, self.config)
        if getattr(base.config, "pad_token_id", None) is None:
            base.config.pad_token_id = self.encoder.tokenizer.pad_token_id
        return base, new

    def model(self, seed: int, method: Method) -> Any:
        """A new PeftModel, a function of ``seed``; a warning names random frozen weights."""
        set_seed(seed)
        base, new = self.base()
        config = models.adapter_config(base, self.args, self.task)
        try:
            model = get_peft_model(base, method.adapter(config)).train()
        except (ValueError, TypeError) as error:
            text = f"target_modules, rank: the model cannot be adapted: {error}"
            raise ProblemError(text) from error
        named = model.get_base_model().named_parameters()
        frozen = {name.replace(".base_layer.", ".") for name, p in named if not p.requires_grad}
        if names := ", ".join(name for name in new if name in frozen):
            logger.warning_once(f"{names}: random and frozen; name the modules in modules_to_save")
        return model

    def trainer(self, args: BilevelTrainingArguments, method: Method) -> BilevelTrainer:
        """The trainer of a new model by ``method``."""
        model = self.model(args.seed, method)
        options = self.options(model) | {"eval_dataset": self.evaluation}
        options |= {"train_dataset": self.train, "upper_dataset": self.upper}
        try:
            return self.trainer_class()(model, args, method=copy.deepcopy(method), **options)
        except (ValueError, RuntimeError, OSError) as error:  # a logger is not installed, say
            raise ProblemError(str(error)) from error

    def require_sane(self, loss: float) -> None:
        """Raise NonFiniteError if ``loss`` is NaN or beyond 10 times the loss of a guess."""
        choices = self.config.num_labels if self.task.classes else len(self.encoder.tokenizer)
        guess = math.log(choices)
        if self.args.task == "regression":  # the guess is 0
            guess = sum(float(label) ** 2 for label in self.train["labels"]) / len(self.train)
        if not loss <= 10 * max(guess, 1.0):
            raise NonFiniteError(
                f"the training diverged: the loss is {loss:.2g} and that of a guess {guess:.2g}; "
                "no adapter is written; lower learning_rate"
            )

    def trainer_class(self) -> type[BilevelTrainer]:
        """The class of the task's trainer."""
        return sft_trainer() if self.args.task == SFT else BilevelTrainer

    def options(self, model: Model) -> dict[str, Any]:
        """The arguments for a trainer of ``model`` that depend on the task."""
        options: dict[str, Any] = {"processing_class": self.encoder.tokenizer}
        if self.task.metrics is not None:  # TRL has metrics and a collator of its own
            options["compute_metrics"] = self.task.metrics
            options["preprocess_logits_for_metrics"] = self.task.reduce
            if self.task.peft != "SEQ_CLS":
                # A model that is given no labels, as for the losses of rows, needs decoder inputs.
                options["data_collator"] = DataCollatorForSeq2Seq(self.encoder.tokenizer, model)
        return options


def prepare(
    args: ModelArguments,
    data: Any,
    training: BilevelTrainingArguments,
    *methods: Method,
    numbered: bool = False,
) -> Setup:
    """Read and encode the data for ``methods``; ``numbered`` training rows keep column `ROW`."""
    read = list[str]()  # columns of the training rows, beside those of the task
    for method in methods:
        column = getattr(method, "column", None)  # of which the method makes its tags
        read += [x for x in ([column] if column else method.tags) if x not in (INDEX, *read)]
    task, name, of_trl = TASKS[args.task], args.tokenizer or args.model, args.task == SFT
    columns = [] if of_trl else data.columns(args.task)
    rows, upper_rows, evaluation_rows = data.read(read)
    require_columns(rows, columns, TRAIN)  # before the classes are read
    names = class_names(rows, data.label_column) if task.classes else ()
    scored_on, changed = attributed.digests_in(rows), None
    if files := getattr(data, "corrections", None):
        if args.task != "text-classification":
            raise ProblemError(f"corrections: need a class a row; {args.task} has none")
        before = rows[data.label_column][:]
        for file in files:  # the last one about a row counts, as in a second round of search
            rows, lines = attributed.corrected(rows, file, columns)
            scored_on |= attributed.digests_in(lines)
        changed = sum(old != new for old, new in zip(before, rows[data.label_column]))
    same_text = attributed.contradicted(rows, columns) if names else {}
    config = models.load_config(args.model, args.task, names)
    length = (training.max_length or 2) if of_trl else data.max_length
    tokenizer = models.load_tokenizer(name, config, length, args.task)
    encoder: Any
    if of_trl:
        template = bool(tokenizer.chat_template or training.chat_template_path)
        encoder = Conversations(tokenizer, training.dataset_text_field, template)
    else:
        encoder = Encoder(args.task, data, tokenizer, names)
    require_columns(rows, read, TRAIN)
    train = encoder.encode(rows, TRAIN, read).add_column(ROW, range(len(rows)))
    upper = None if upper_rows is None else encoder.encode(upper_rows, UPPER, read)
    evaluation = None
    if evaluation_rows is not None:
        evaluation = encoder.encode(evaluation_rows, EVALUATION)
        if common := len(shared_rows(evaluation, train)):
            text = "evaluation examples are training examples too; remove them for honest metrics"
            logger.warning(f"{common} of {len(evaluation)} {text}")
    elif data.eval_fraction:
        train, evaluation = held_out(train, data.eval_fraction, [ROW, *read])
        evaluation_rows = rows.select(evaluation[ROW])
        evaluation = evaluation.remove_columns([ROW, *read])
    train = train if numbered else train.remove_columns(ROW)
    for part, where in ((upper, UPPER), (evaluation, EVALUATION)):
        if part is not None and args.task == "text-classification":
            warn_of_one_class(part, "labels", where)
    parts = train, upper, evaluation, rows, upper_rows, evaluation_rows
    return Setup(args, task, config, encoder, *parts, scored_on, same_text, changed)
