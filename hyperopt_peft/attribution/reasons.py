"""`Reasons`: the training rows behind predictions, as text, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperopt_peft.utils.plots import row_groups
from hyperopt_peft.utils.tables import cells, printable, write_csv

#: The training rows shown for a prediction, and the predictions in a picture. A set of more rows
#: gets a remark: the median sets have 3 to 6 of 300 rows (benchmarks/results/attribution.md).
SHOWN, PANELS = 10, 4


@dataclass(frozen=True)
class Reason:
    """A few training rows whose removal changes the prediction for one row or token.

    Attributes:
        row: the number of the explained row.
        token: the number of the token among the row's labelled tokens; None if a row has one class.
        predicted: the number of the class that the head predicts.
        becomes: the class that the head predicts without ``rows``; None if no set was found.
        rows: the numbers of the training rows to remove, the largest score first.
        scores: dΦ/dv of each of ``rows``, where v is the row's weight.
        margin: Φ, the logit of ``predicted`` minus log Σ exp of the other logits.
        searched: the largest number of rows that a search removes.

    Example:
        >>> reason = Reason(0, None, 1, 0, rows=[7], scores=[0.9], margin=0.5, searched=2)
        >>> f"predicted {reason.predicted}; {reason.becomes} without the rows {reason.rows}"
        'predicted 1; 0 without the rows [7]'
    """

    row: int
    token: int | None
    predicted: int
    becomes: int | None
    rows: list[int]
    scores: list[float]
    margin: float
    searched: int


@dataclass(frozen=True)
class Reasons(Sequence[Reason]):
    """A `Reason` for each explained row, or token.

    Attributes:
        reasons: the reasons in the order of the rows.
        names: the name of each class by its number.
        columns: the training rows' columns to show.
        explained: the explained rows' columns to show.
        numbers: the number to show for each training row; by default its index.

    Example:
        >>> reason = Reason(0, None, 1, 0, [1], [0.9], 0.5, 2)
        >>> texts = {"text": ["bad", "great"], "label": ["no", "yes"]}
        >>> print(Reasons([reason], {0: "no", 1: "yes"}, texts, {"text": ["great film"]}))
        row 0: great film
          predicted yes; no without this training row:
             1  great | yes
    """

    reasons: list[Reason]
    names: Mapping[int, str]
    columns: Mapping[str, Sequence[Any]]
    explained: Mapping[str, Sequence[Any]]
    numbers: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.reasons)

    def __getitem__(self, place: Any) -> Any:
        return self.reasons[place]

    def __str__(self) -> str:
        return "\n".join(map(self.text, self.reasons))

    def name(self, label: int | None) -> str:
        """The name of the class ``label``, for a terminal."""
        return "" if label is None else printable(str(self.names.get(label, label)))

    def text(self, reason: Reason) -> str:
        """``reason`` in lines, with up to `SHOWN` of its training rows."""
        begin = f"{self.title(reason)}\n  predicted {self.name(reason.predicted)}"
        if reason.becomes is None:
            return f"{begin}, even without the {reason.searched} rows that support it most"
        lines = [f"{begin}; {self.name(reason.becomes)} without {self._rows(reason)}:"]
        lines += [f"  {self.line(row)}" for row in reason.rows[:SHOWN]]
        if len(reason.rows) > SHOWN:
            lines.append(f"       … and {len(reason.rows) - SHOWN} more")
        return "\n".join(lines)

    def title(self, reason: Reason, width: int = 80) -> str:
        """The number of the explained row, its token and its columns."""
        cells_of_row = [column[reason.row] for column in self.explained.values()]
        words = next((cell for cell in cells_of_row if isinstance(cell, list)), None)
        title = f"row {reason.row}"
        if reason.token is not None:
            title += f", token {reason.token}"
            title += f" ({printable(str(words[reason.token]))})" if words else ""
        return f"{title}: {cells(self.explained, reason.row, width)}".removesuffix(": ")

    def _rows(self, reason: Reason) -> str:
        count = len(reason.rows)
        many = " (no few rows decide this prediction)" if count > SHOWN else ""
        return "this training row" if count == 1 else f"these {count} training rows{many}"

    def line(self, row: int, width: int = 80) -> str:
        """The number and the columns of the training row ``row``."""
        number = self.numbers[row] if self.numbers else row
        return f"{number:6d}  {cells(self.columns, row, width)}".rstrip()

    def to_csv(self, path: str | Path, *, escape_formulas: bool = False) -> None:
        """Write a line for each explained row and each of its training rows; see `write_csv`."""
        lines = []
        for reason in self.reasons:
            classes = self.name(reason.predicted), self.name(reason.becomes)
            begin = (reason.row, reason.token, *classes)
            for row, score in zip(reason.rows, reason.scores, strict=True):
                number = self.numbers[row] if self.numbers else row
                shown = [values[row] for values in self.columns.values()]
                lines.append((*begin, number, score, *shown))
            if not reason.rows:
                lines.append((*begin, None, None, *(None for _ in self.columns)))
        heads = ("explained", "token", "predicted", "becomes")
        names = [*heads, "row", "score", *(f"data_{x}" if x in heads else x for x in self.columns)]
        write_csv(path, names, lines, escape_formulas=escape_formulas)

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure of the first explained rows, each with its training rows.

        It is also written to the file ``path``, whose suffix gives the format.
        """
        groups = {}
        for reason in [each for each in self.reasons if each.rows][:PANELS]:
            move = f"predicted {self.name(reason.predicted)}; {self.name(reason.becomes)} without"
            title = f"{self.title(reason, 55)}\n{move} {self._rows(reason)}"
            texts = [self.line(row, 70) for row in reason.rows[:SHOWN]]
            groups[title] = dict(zip(texts, reason.scores))
        return row_groups(groups, path, "how much a row raises the margin of the predicted class")
