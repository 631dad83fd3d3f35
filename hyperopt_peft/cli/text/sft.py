"""Texts, prompts with completions, and conversations, as TRL's SFTTrainer reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from hyperopt_peft.cli.text.data import require_columns
from hyperopt_peft.cli.text.encode import for_each
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.trainer import BilevelTrainer, bilevel

#: Columns that a chat template may read beside the messages.
OF_TEMPLATE = ("tools", "chat_template_kwargs")


def sft_trainer() -> type[BilevelTrainer]:
    """`BilevelTrainer` over TRL's SFTTrainer; a ProblemError where TRL is not installed."""
    try:
        from trl import SFTTrainer
    except ImportError as error:
        text = f"task sft: needs TRL ({error}); run pip install 'hyperopt-peft[trl]'"
        raise ProblemError(text) from error
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
                f"{where}: have the columns {names}, not {wanted}{like}; rename them"
            )
        self.columns = layout
        require_columns(rows, layout, where)
        kept = (name for name in names if name in (*OF_TEMPLATE, *keep))
        rows = rows.select_columns(list(dict.fromkeys([*layout, *kept])))
        for_each(self._check, rows, range(len(rows)), where)
        return rows

    def _check(self, row: Mapping[str, Any]) -> None:
        for column in self.columns:
            value, wrong = row[column], ""
            if type(value) is not type(row[self.columns[0]]):
                wrong = f"{value!r}; give two texts, or two lists"
            elif not isinstance(value, str) or column == "messages":
                wrong = self._wrong(value)
            elif not value.strip():
                wrong = f"{value!r}; fill it or remove the row"
            if wrong:
                raise ProblemError(f"{column!r} has {wrong}")

    def _wrong(self, messages: Any) -> str:
        """The fault of ``messages``, or nothing."""
        if not self.chat_template:
            return "messages, and the tokenizer no chat template; give chat_template_path, or texts"
        every = messages if isinstance(messages, list) else []
        if not every or not all(isinstance(x, Mapping) and x.get("role") for x in every):
            return f"{messages!r}, not a list of messages with a 'role' and a 'content' each"
        said = (x.get("tool_calls") or x.get("content") for x in every if x["role"] == "assistant")
        blank = not all(str(x or "").strip() for x in said)
        return "an empty message of the assistant; fill it or remove the row" if blank else ""
