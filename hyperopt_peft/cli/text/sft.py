"""Texts, prompts with completions, and conversations, as TRL's SFTTrainer reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from hyperopt_peft.cli.text.data import TRAIN, require_columns
from hyperopt_peft.cli.text.encode import check_each
from hyperopt_peft.cli.text.models import ModelArguments, load_config, load_tokenizer
from hyperopt_peft.cli.text.setup import Setup
from hyperopt_peft.cli.text.sources import Sources
from hyperopt_peft.cli.text.tasks import TASKS
from hyperopt_peft.errors import ProblemError

SFT = "sft"
#: Columns that a chat template may read beside the messages.
OF_TEMPLATE = ("tools", "chat_template_kwargs")


def sft_trainer() -> Any:
    """TRL's SFTTrainer; a ProblemError where TRL is not installed."""
    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise ProblemError(
            f"task sft: trains with TRL, which cannot be imported ({error}); run pip install "
            "'hyperopt-peft[trl]'"
        ) from error
    return SFTTrainer


@dataclass(frozen=True)
class SFTSetup(Setup):
    """The texts, and the construction of models for TRL's SFTTrainer."""

    def options(self, model: Any) -> dict[str, Any]:
        """The arguments of any trainer of ``model``: TRL has a collator and metrics of its own."""
        return {"processing_class": self.encoder.tokenizer}


def prepare(args: ModelArguments, data: Sources, training: Any) -> SFTSetup:
    """Read and check the texts, without loading weights.

    Args:
        args: the options of the model.
        data: the sources.
        training: an ``SFTConfig``.

    Raises:
        ProblemError: invalid data, or a model that cannot be loaded.
    """
    config, name = load_config(args.model), args.tokenizer or args.model
    tokenizer = load_tokenizer(name, config, training.max_length or 2, SFT)
    template = bool(tokenizer.chat_template or training.chat_template_path)
    encoder = Conversations(tokenizer, training.dataset_text_field, template)
    rows = data.read_train(encoder.encode)
    train = rows.remove_columns(data.column) if data.files else encoder.encode(rows, TRAIN)
    return SFTSetup(args, TASKS["causal-lm"], config, encoder, train, None, rows, None)


@dataclass
class Conversations:
    """Checks rows, of which all have the layout of the first; TRL encodes them.

    Attributes:
        tokenizer: of the model.
        text_field: the column of plain texts.
        chat_template: whether there is one, which messages need.
        layout: the columns with text, once rows are read.
    """

    tokenizer: Any
    text_field: str = "text"
    chat_template: bool = True
    layout: tuple[str, ...] = field(default=(), init=False)

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """The columns of ``rows`` that are trained on; ``where`` names the rows in errors.

        Raises:
            ProblemError: no layout or another one than before; an empty cell or text; a message
                without a role; or messages without a chat template.
        """
        layouts = [("messages",), ("prompt", "completion"), (self.text_field,)]
        columns = rows.column_names
        known = [self.layout] if self.layout else layouts
        found = next((names for names in known if set(names) <= set(columns)), None)
        if found is None:
            wanted = " or ".join(" and ".join(map(repr, names)) for names in known)
            as_before = ", as the files before" if self.layout else ""
            raise ProblemError(
                f"{where}: has the columns {columns}, not {wanted}{as_before}; rename the columns"
            )
        self.layout = found
        require_columns(rows, found, where)
        rows = rows.select_columns([*found, *(name for name in OF_TEMPLATE if name in columns)])
        check_each(self._check, rows, range(len(rows)), where)
        return rows

    def _check(self, row: Mapping[str, Any]) -> None:
        values = [row[column] for column in self.layout]
        if len({type(value) for value in values}) > 1:
            raise ProblemError(f"{values[0]!r} and {values[1]!r}: give two texts, or two lists")
        for column, value in zip(self.layout, values, strict=True):
            if isinstance(value, str) and column != "messages":
                if not value.strip():
                    raise ProblemError(f"{column!r} has {value!r}; fill it or remove the row")
            else:
                self._check_messages(column, value)

    def _check_messages(self, column: str, messages: Any) -> None:
        if not isinstance(messages, list) or not messages:
            raise ProblemError(f"{column!r} has {messages!r}, not a list of messages")
        for message in messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str) or not role.strip():
                raise ProblemError(
                    f"{column!r} has the message {message!r}, without a role; give each message a "
                    "'role' and a 'content'"
                )
            content = message.get("content")
            blank = not content or (isinstance(content, str) and not content.strip())
            if blank and role == "assistant" and not message.get("tool_calls"):
                raise ProblemError(
                    f"{column!r} has an empty message of the assistant; fill it or remove the row"
                )
        if not self.chat_template:
            raise ProblemError(
                f"{column!r} has messages, and the tokenizer no chat template; give "
                "chat_template_path, or texts"
            )
