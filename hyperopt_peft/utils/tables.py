"""Tables as text, CSV, LaTeX and HTML, and text that a terminal shows as it is."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperopt_peft.errors import ProblemError

#: Controls but tab and newline, marks of direction, invisible characters but joiners, surrogates.
UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)

WORD = re.compile(r"[^\W\d_]{2}")


def printable(text: str) -> str:
    r"""``text`` with each character escaped that changes what a terminal shows of the others.

    Example:
        >>> print(printable("\x1b[31mred\x1b[0m, and \u202eturned around"))
        \x1b[31mred\x1b[0m, and \u202eturned around
    """
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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

    A spreadsheet takes a text that begins with one of = + - @ for a formula and runs it. With
    ``escape_formulas`` such a text begins with an apostrophe in the file, which spreadsheets do not
    show and other programs read as a part of the text. Numbers stay as they are.

    Raises:
        ProblemError: the file cannot be written.
    """

    def escaped(cell: Any) -> Any:
        formula = isinstance(cell, str) and cell.lstrip("\t\r\n ").startswith(("=", "+", "-", "@"))
        return f"'{cell}" if escape_formulas and formula else cell

    try:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows(map(escaped, row) for row in (heads, *rows))
    except OSError as error:
        raise ProblemError(f"{path}: cannot be written ({error.strerror})") from error


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """``rows`` of cells, the heads first, in columns; numbers end at the right, words begin left.

    Example:
        >>> print(aligned([["method", "loss"], ["lora", 0.125], ["dora", "–"]]))
        method   loss
        lora    0.125
        dora        –
    """
    columns = [[printable(str(cell)) for cell in column] for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    columns = [
        [
            cell.ljust(width) if WORD.search(" ".join(column[1:])) else cell.rjust(width)
            for cell in column
        ]
        for column, width in zip(columns, widths, strict=True)
    ]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def latex(rows: Sequence[Sequence[str]]) -> str:
    r"""``rows`` of cells, the heads first, as a ``tabular`` of the LaTeX package booktabs.

    Example:
        >>> print(latex([["method", "F1 ± error"], ["a_b", "0.5 ± 0.1"]]))
        \begin{tabular}{lr}
        \toprule
        method & F1 $\pm$ error \\
        \midrule
        a\_b & 0.5 $\pm$ 0.1 \\
        \bottomrule
        \end{tabular}
    """
    head, *body = (" & ".join(map(_latex, row)) + r" \\" for row in rows)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"
    parts = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts)


def _latex(cell: str) -> str:
    signs = {"±": r"$\pm$", "−": "$-$", "–": "--", "\\": r"\textbackslash{}"}
    signs |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    signs |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(signs.get(letter, letter) for letter in cell)


#: Tables scroll sideways inside their own box, so that a narrow screen shows the page whole.
STYLE = """body{font:16px/1.4 sans-serif;max-width:72em;margin:1em auto;padding:0 .8em}
table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;white-space:nowrap}
p{white-space:pre-line}.table{overflow-x:auto}pre{white-space:pre-wrap;overflow-wrap:anywhere}img{max-width:100%}"""


def html_page(title: str, parts: Iterable[str]) -> str:
    """A page that is read at any width, of ``parts`` in HTML under ``title``, a text.

    Example:
        >>> html_page("a < b", ["<p>true"]).splitlines()[-1]
        '<p>true'
    """
    title = html.escape(printable(title))
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title>"
    view = "<meta name=viewport content='width=device-width'>"
    return "\n".join([f"{head}{view}<style>{STYLE}</style>", f"<h1>{title}</h1>", *parts])


def html_table(rows: Sequence[Sequence[Any]]) -> str:
    """``rows`` of cells, the heads first, as an HTML table.

    Example:
        >>> html_table([["<mine>"]])
        '<div class=table><table><tr><th>&lt;mine&gt;</tr></table></div>'
    """
    lines = []
    for kind, row in zip(["th", *["td"] * len(rows)], rows, strict=False):
        cells = "".join(f"<{kind}>{html.escape(printable(str(cell)))}" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<div class=table><table>{''.join(lines)}</table></div>"
