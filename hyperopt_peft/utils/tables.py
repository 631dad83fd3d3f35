"""Tables of text, and text that a terminal shows as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: Controls but tab and newline, marks of direction, invisible characters but joiners, surrogates.
UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""``text`` with each character escaped that changes what a terminal shows of the others.

    Example:
        >>> print(printable("\x1b[31mred\x1b[0m, and \u202eturned around"))
        \x1b[31mred\x1b[0m, and \u202eturned around
    """
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """``rows`` of cells, the heads first, in columns of which all but the first end at the right.

    Example:
        >>> print(aligned([["method", "loss"], ["lora", 0.125], ["dora", "–"]]))
        method   loss
        lora    0.125
        dora        –
    """
    columns = [[printable(str(cell)) for cell in column] for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    columns = [
        [cell.rjust(width) if number else cell.ljust(width) for cell in column]
        for number, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
