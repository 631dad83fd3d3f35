"""``report.html``: one self-contained page about a run, without scripts or files beside it."""

from __future__ import annotations

import base64
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

from hyperopt_peft.utils.plots import LOSSES, level_curves

REPORT = "report.html"
PACKAGES = ("hyperopt-peft", "torch", "transformers", "peft", "datasets")
STYLE = """
:root { color-scheme: light dark }
body { max-width: 56rem; margin: 0 auto; padding: 2rem 1rem; font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
.verdict { font-size: 1.15rem; border-left: 4px solid #0072b2; padding-left: .8rem }
.warning::before { content: "⚠ " } .dim { opacity: .7 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #8886; text-align: left }
pre { background: #8882; padding: .8rem; font-size: .85rem; white-space: pre-wrap }
img { width: 100%; background: #fff }
"""


@dataclass
class Report:
    """What a page shows, in this order.

    Attributes:
        command: the command of ``hyperopt-peft``.
        verdict: the result in a sentence.
        options: the values of each option, of the file and of the command line.
        subtitle: the data and the model in a few words.
        warnings: reasons not to believe the verdict.
        tables: rows of cells by title, the heads first.
        pictures: files by caption; of one that does not exist nothing is shown.
        curves: the logs of the phases by title, of which both levels' losses are drawn.
        texts: what is shown as it was printed, by title.

    Example:
        >>> tables = {"Results": [["method", "accuracy"], ["lora", 0.81]]}
        >>> page = Report("train", "accuracy 0.81", {"rank": ["8"]}, tables=tables).html()
        >>> "<td>0.81</td>" in page, "hyperopt-peft train" in page
        (True, True)
    """

    command: str
    verdict: str
    options: Mapping[str, Sequence[str]]
    subtitle: str = ""
    warnings: Sequence[str] = ()
    tables: Mapping[str, Sequence[Sequence[Any]]] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: str | Path, name: str = REPORT) -> Path:
        """Write the page to ``folder``; the path."""
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def html(self) -> str:
        """The page."""
        title = f"hyperopt-peft {self.command}"
        verdict = self.verdict[:1].upper() + self.verdict[1:].rstrip(".")
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        settings = [["option", "value"], *([k, " ".join(v)] for k, v in self.options.items())]
        lines = [title, *(shlex.join([f"--{k}", *v]) for k, v in self.options.items())]
        again = " \\\n    ".join(lines)
        pictures = [(caption, path) for caption, path in self.pictures.items() if path.exists()]
        texts = [(title, text) for title, text in self.texts.items() if text]
        return "\n".join(
            [
                f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
                f"<h1>{escape(title)}</h1>",
                _paragraph("dim", self.subtitle),
                _paragraph("verdict", f"{verdict}."),
                *(_paragraph("warning", text) for text in self.warnings),
                *(_section(title, _html_table(rows)) for title, rows in self.tables.items()),
                *(_picture(caption, path.read_bytes()) for caption, path in pictures),
                *(_curves(title, history) for title, history in self.curves.items()),
                *(_section(title, f"<pre>{escape(text)}</pre>") for title, text in texts),
                _section("Settings", _html_table(settings)),
                _section("The same run again", f"<pre>{escape(again)}</pre>"),
                _paragraph("dim", f"Python {platform.python_version()}, {versions}"),
                "</body>\n</html>\n",
            ]
        )


def _paragraph(kind: str, text: str) -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def _html_table(rows: Sequence[Sequence[Any]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = (f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _picture(caption: str, data: bytes) -> str:
    encoded = base64.b64encode(data).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _curves(title: str, history: Sequence[Mapping[str, Any]]) -> str:
    """The losses of a phase, if there are two points of one."""
    if not any(sum(key in record for record in history) > 1 for key in LOSSES):
        return ""
    data = BytesIO()
    level_curves(history).savefig(data, dpi=150)
    return _picture(title, data.getvalue())
