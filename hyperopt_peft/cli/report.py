"""``report.html``: a page about a run, with the pictures beside it."""

from __future__ import annotations

import html
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperopt_peft.utils.plots import LOSSES, level_curves
from hyperopt_peft.utils.tables import aligned, printable
from hyperopt_peft.utils.versions import versions

#: Texts, or rows of cells of which the first has the heads, by title.
Sections = Mapping[str, str | Sequence[Sequence[Any]]]
#: Tables scroll sideways in a box of their own, so that a narrow screen shows the page whole.
STYLE = """body{font:16px/1.4 sans-serif;max-width:72em;margin:1em auto;padding:0 .8em}
table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;white-space:nowrap}
p{white-space:pre-line}.table{overflow-x:auto}img{max-width:100%}
pre{white-space:pre-wrap;overflow-wrap:anywhere}"""


@dataclass
class Report:
    """The contents of a page.

    Attributes:
        verdict: the result in a sentence.
        pictures: files in the page's folder by caption.
        curves: the logs of the phases by title; the losses of both levels are drawn.
        details: sections for experts, which a reader unfolds.
    """

    command: str
    verdict: str
    options: Mapping[str, Sequence[str]]
    sections: Sections = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: str | Path) -> Path:
        """Write the page and the curves to ``folder``; the path of the page."""
        folder, pictures = Path(folder), dict(self.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for title, history in self.curves.items():
            if any(sum(key in record for record in history) > 1 for key in LOSSES):
                pictures[title] = f"{title.lower()}.png"
                level_curves(history, folder / pictures[title])
        page = folder / "report.html"
        page.write_text(self.html(pictures), encoding="utf-8")
        return page

    def html(self, pictures: Mapping[str, str]) -> str:
        """The page."""
        again = [f"hyperopt-peft {self.command}"]
        again += [shlex.join([f"--{name}", *words]) for name, words in self.options.items()]
        found = ", ".join(map(" ".join, versions().items()))
        last = {"The same run again": " \\\n  ".join(again)}
        last["Versions"] = f"Python {platform.python_version()}, {found}"
        view = "<meta charset=utf-8><meta name=viewport content='width=device-width'>"
        parts = [f"<!doctype html>{view}<title>{again[0]}</title><style>{STYLE}</style>"]
        names = "train_file", "dataset", "model"
        used = " · ".join(word for name in names for word in self.options.get(name, ()))
        parts += [f"<h1>{again[0]}</h1><p>{_escaped(used)}<p><b>{_escaped(self.verdict)}</b>"]
        parts += _parts(self.sections)
        parts += [
            f'<p><img src="{html.escape(path)}" alt="{html.escape(caption)}">'
            for caption, path in pictures.items()
        ]
        parts += ["<details><summary>Details</summary>", *_parts({**self.details, **last})]
        return "\n".join([*parts, "</details>\n"])


def as_text(sections: Sections) -> str:
    """``sections`` for a terminal."""
    shown = (x if isinstance(x, str) else aligned(x) for x in sections.values())
    return "\n\n".join(f"{title}\n{text}" for title, text in zip(sections, shown))


def _parts(sections: Sections) -> list[str]:
    return [f"<h2>{_escaped(title)}</h2>\n{_content(x)}" for title, x in sections.items()]


def _content(rows: Any) -> str:
    if isinstance(rows, str):
        return f"<pre>{_escaped(rows)}</pre>"
    kinds = ["th", *["td"] * (len(rows) - 1)]
    cells = ("".join(f"<{kind}>{_escaped(cell)}" for cell in row) for kind, row in zip(kinds, rows))
    lines = "".join(f"<tr>{line}</tr>" for line in cells)
    return f"<div class=table><table>{lines}</table></div>"


def _escaped(text: Any) -> str:
    return html.escape(printable(str(text)))
