"""Texts, prompts with completions, and conversations, as TRL's SFTTrainer reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from hyperopt_peft.cli.text.data import EVALUATION, TRAIN, ExampleData, require_columns
from hyperopt_peft.cli.text.encode import check_each
from hyperopt_peft.cli.text.models import ModelArguments, load_config, load_tokenizer
from hyperopt_peft.cli.text.setup import Setup, trainer_errors, warn_of_shared
from hyperopt_peft.cli.text.tasks import TASKS
from hyperopt_peft.errors import ProblemError

SFT = "sft"
#: Columns that a chat template may read beside the messages.
OF_TEMPLATE = ("tools", "chat_template_kwargs")


def require_trl() -> Any:
    """The module ``trl``; a ProblemError where TRL is not installed."""
    try:
        import trl
    except ImportError as error:
        raise ProblemError(
            f"task sft: trains with TRL, which cannot be imported ({error}); run pip install "
            "'hyperopt-peft[trl]'"
        ) from error
    return trl


@dataclass(frozen=True)
class SFTSetup(Setup):
    """The texts, and the construction of models for TRL's SFTTrainer."""

    def options(self, model: Any) -> dict[str, Any]:
        """The arguments of any trainer of ``model``: TRL has a collator and metrics of its own."""
        return {"processing_class": self.encoder.tokenizer}

    def trainer(self, args: Any) -> Any:
        """An SFTTrainer of a new model, by the ``SFTConfig`` ``args``."""
        model = self.model(args.seed, dora=False)
        data = {"train_dataset": self.train, "eval_dataset": self.evaluation}
        with trainer_errors():
            return require_trl().SFTTrainer(model, args, **data, **self.options(model))


def prepare(args: ModelArguments, data: ExampleData, training: Any) -> SFTSetup:
    """Read and check the texts, without loading weights.

    Args:
        args: the options of the model.
        data: training and evaluation examples.
        training: an ``SFTConfig``.

    Raises:
        ProblemError: invalid data, or a model that cannot be loaded.
    """
    config, name = load_config(args.model), args.tokenizer or args.model
    tokenizer = load_tokenizer(name, config, training.max_length or 2, SFT)
    template = bool(tokenizer.chat_template or training.chat_template_path)
    encoder = Conversations(tokenizer, training.dataset_text_field, template)
    evaluation = None
    rows, evaluation_rows = data.read()
    train = encoder.encode(rows, TRAIN)
    if evaluation_rows is not None:
        evaluation = encoder.encode(evaluation_rows, EVALUATION)
        warn_of_shared(evaluation, "evaluation examples", train, "training examples")
    task = TASKS["causal-lm"]
    return SFTSetup(args, task, config, encoder, train, evaluation, rows, evaluation_rows)


@dataclass
class Conversations:
    """Checks rows, of which all have the layout of the first; TRL encodes them.

    Attributes:
        tokenizer: of the model.
        text_field: the column of plain texts.
        chat_template: whether there is one, which messages need.
        columns: those with text, once rows are read.
    """

    tokenizer: Any
    text_field: str = "text"
    chat_template: bool = True
    columns: tuple[str, ...] = field(default=(), init=False)

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """The columns of ``rows`` that are trained on; ``where`` names the rows in errors.

        Raises:
            ProblemError: no layout or another one than before; an empty cell or text; a message
                without a role; or messages without a chat template.
        """
        names, layouts = rows.column_names, [("messages",), ("prompt", "completion")]
        layouts = [self.columns] if self.columns else [*layouts, (self.text_field,)]
        layout = next((columns for columns in layouts if {*columns} <= {*names}), None)
        if layout is None:
            wanted = " or ".join(" and ".join(map(repr, columns)) for columns in layouts)
            like = ", as the files before" if self.columns else ""
            raise ProblemError(
                f"{where}: has the columns {names}, not {wanted}{like}; rename the columns"
            )
        self.columns = layout
        require_columns(rows, layout, where)
        rows = rows.select_columns([*layout, *(name for name in OF_TEMPLATE if name in names)])
        check_each(self._check, rows, range(len(rows)), where)
        return rows

    def _check(self, row: Mapping[str, Any]) -> None:
        values = [row[column] for column in self.columns]
        if len({type(value) for value in values}) > 1:
            raise ProblemError(f"{values[0]!r} and {values[1]!r}: give two texts, or two lists")
        for column, value in zip(self.columns, values, strict=True):
            if not isinstance(value, str) or column == "messages":
                self._check_messages(column, value)
            elif not value.strip():
                raise ProblemError(f"{column!r} has {value!r}; fill it or remove the row")

    def _check_messages(self, column: str, messages: Any) -> None:
        wrong = ""
        if not self.chat_template:
            wrong = (
                "messages, and the tokenizer no chat template; give chat_template_path, or texts"
            )
        elif not isinstance(messages, list) or not messages:
            wrong = f"{messages!r}, not a list of messages"
        for message in () if wrong else messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if not role:
                wrong = f"{message!r}, without a role; give each message a 'role' and a 'content'"
            elif role == "assistant" and not (
                message.get("tool_calls") or str(message.get("content") or "").strip()
            ):
                wrong = "an empty message of the assistant; fill it or remove the row"
        if wrong:
            raise ProblemError(f"{column!r} has {wrong}")
