"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """``rows`` of cells, the heads first, in columns of which all but the first end at the right.

    Example:
        >>> print(aligned([["method", "loss"], ["lora", 0.125], ["dora", "–"]]))
        method   loss
        lora    0.125
        dora        –
    """
    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    columns = [
        [cell.rjust(width) if number else cell.ljust(width) for cell in column]
        for number, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
