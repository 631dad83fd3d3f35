"""Tables as text and CSV, and text that is safe for a terminal."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperopt_peft.errors import ProblemError

#: Control characters except tab and newline, direction marks, invisible characters, surrogates.
UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)

WORD = re.compile(r"[^\W\d_]{2}")


def printable(text: str) -> str:
    r"""``text`` with an escape for each character that changes how a terminal shows the others.

    Example:
        >>> print(printable("\x1b[31mred\x1b[0m, and \u202eturned around"))
        \x1b[31mred\x1b[0m, and \u202eturned around
    """
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def cells(columns: Mapping[str, Sequence[Any]], row: int, width: int = 80) -> str:
    """The entries of ``row`` in ``columns`` on one line, each at most ``width`` characters.

    Example:
        >>> cells({"text": ["ab c", "d"], "tags": [["x", "y"], []]}, 0)
        'ab c | x y'
    """
    entries = (values[row] for values in columns.values())
    words = (" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in entries)
    texts = [printable(" ".join(text.split())) for text in words]
    return " | ".join(text if len(text) <= width else f"{text[: width - 1]}…" for text in texts)


def write_csv(
    path: str | Path,
    heads: Iterable[str],
    rows: Iterable[Sequence[Any]],
    *,
    escape_formulas: bool = False,
) -> None:
    """Write ``heads`` and ``rows`` to the file ``path``.

    A spreadsheet runs text that begins with = + - or @ as a formula. ``escape_formulas`` puts an
    apostrophe before such text; spreadsheets hide it, and other programs read it as text. Numbers
    do not change.

    Raises:
        ProblemError: the file cannot be written.
    """

    def escaped(cell: object) -> Any:
        formula = isinstance(cell, str) and cell.lstrip("\t\r\n ").startswith(("=", "+", "-", "@"))
        return f"'{cell}" if escape_formulas and formula else cell

    try:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows(map(escaped, row) for row in (heads, *rows))
    except OSError as error:
        raise ProblemError(f"{path}: cannot be written ({error.strerror})") from error


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """``rows`` of cells, the heads first; columns without a word are right-aligned.

    Example:
        >>> print(aligned([["method", "loss"], ["lora", 0.125], ["dora", "–"]]))
        method   loss
        lora    0.125
        dora        –
    """
    columns = []
    for column in zip(*rows, strict=True):
        texts = [printable(str(cell)) for cell in column]
        width, words = max(map(len, texts)), WORD.search(" ".join(texts[1:]))
        columns.append([text.ljust(width) if words else text.rjust(width) for text in texts])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
