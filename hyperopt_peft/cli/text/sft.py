"""Texts, prompts with completions, and conversations, as TRL's SFTTrainer reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from hyperopt_peft.cli.text.data import require_columns
from hyperopt_peft.cli.text.encode import check_each
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.trainer import BilevelTrainer, bilevel

#: Columns that a chat template may read beside the messages.
OF_TEMPLATE = ("tools", "chat_template_kwargs")


def sft_trainer() -> type[BilevelTrainer]:
    """`BilevelTrainer` over TRL's SFTTrainer; a ProblemError where TRL is not installed."""
    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise ProblemError(
            f"task sft: trains with TRL, which cannot be imported ({error}); run pip install "
            "'hyperopt-peft[trl]'"
        ) from error
    return bilevel(SFTTrainer)


@dataclass
class Conversations:
    """Checks rows, which must share one layout; TRL encodes them."""

    tokenizer: Any
    text_field: str = "text"
    chat_template: bool = True
    columns: tuple[str, ...] = field(default=(), init=False)

    def encode(self, rows: Dataset, where: str, keep: Collection[str] = ()) -> Dataset:
        """The columns of ``rows`` to train on and to ``keep``; errors have the name ``where``."""
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
        kept = (name for name in names if name in (*OF_TEMPLATE, *keep))
        rows = rows.select_columns(list(dict.fromkeys([*layout, *kept])))
        check_each(self._check, rows, range(len(rows)), where)
        return rows

    def _check(self, row: Mapping[str, Any]) -> None:
        values = [row[column] for column in self.columns]
        if len({type(value) for value in values}) > 1:
            raise ProblemError(f"{values[0]!r} and {values[1]!r}: give two texts, or two lists")
        for column, value in zip(self.columns, values, strict=True):
            wrong = ""
            if not isinstance(value, str) or column == "messages":
                wrong = self._wrong(value)
            elif not value.strip():
                wrong = f"{value!r}; fill it or remove the row"
            if wrong:
                raise ProblemError(f"{column!r} has {wrong}")

    def _wrong(self, messages: Any) -> str:
        """What is wrong with ``messages``, or nothing."""
        if not self.chat_template:
            return "messages, and the tokenizer no chat template; give chat_template_path, or texts"
        if not isinstance(messages, list) or not messages:
            return f"{messages!r}, not a list of messages"
        for message in messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if not role:
                return f"{message!r}, without a role; give each message a 'role' and a 'content'"
            said = message.get("tool_calls") or str(message.get("content") or "").strip()
            if role == "assistant" and not said:
                return "an empty message of the assistant; fill it or remove the row"
        return ""
