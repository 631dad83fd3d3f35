"""``report.html``: one self-contained page about a run, without scripts or files beside it."""

from __future__ import annotations

import base64
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from hyperopt_peft.utils.plots import LOSSES, level_curves

REPORT = "report.html"
PACKAGES = ("hyperopt-peft", "torch", "transformers", "peft", "datasets")
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5d6570; --line: #d9dde2; --back: #fff;
  --box: #f4f6f8; --mark: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa3ad; --line: #3a4048;
  --back: #16181b; --box: #202429; --mark: #56b4e9 } }
body { max-width: 56rem; margin: 0 auto; padding: 2rem 1rem; color: var(--ink);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--mark); padding-left: .8rem }
.warning::before { content: "⚠ " } .dim { color: var(--dim) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal }
td:last-child { overflow-wrap: anywhere }
td.number, th.number { text-align: right }
td.number { white-space: nowrap }
pre { background: var(--box); padding: .8rem; border-radius: 6px; font-size: .85rem;
  white-space: pre-wrap }
img { width: 100%; background: #fff; border-radius: 6px }
figure { margin: 1rem 0 } figcaption { color: var(--dim); font-size: .9rem }
</style>
</head>
<body>
<h1>$title</h1>
<p class="dim">$subtitle</p>
<p class="verdict">$verdict</p>
$warnings
$body
<h2>Settings</h2>
$settings
<h2>The same run again</h2>
<pre>$command</pre>
<p class="dim">$versions</p>
</body>
</html>
""")


@dataclass
class Report:
    """What a page shows, in this order.

    Attributes:
        command: the command of ``hyperopt-peft``.
        verdict: the result in a sentence.
        flags: the options of the run, of the file and of the command line.
        subtitle: the data and the model in a few words.
        warnings: reasons not to believe the verdict.
        curves: the logs of the phases by title, of which both levels' losses are drawn.
        pictures: files by caption; of one that does not exist nothing is shown.
        tables: rows of cells by title, the heads first.
        texts: what is shown as it was printed, by title.

    Example:
        >>> tables = {"Results": [["method", "accuracy"], ["lora", 0.81]]}
        >>> page = Report("train", "accuracy 0.81", ["--rank=8"], tables=tables).html()
        >>> '<td class="number">0.81</td>' in page, "hyperopt-peft train" in page
        (True, True)
    """

    command: str
    verdict: str
    flags: Sequence[str]
    subtitle: str = ""
    warnings: Sequence[str] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Sequence[Any]]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: str | Path, name: str = REPORT) -> Path:
        """Write the page to ``folder``; the path."""
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def html(self) -> str:
        """The page."""
        options = by_option(self.flags)
        chosen = [re.split("[= ]", option.removeprefix("--"), maxsplit=1) for option in options]
        parts = [_section(title, _html_table(rows)) for title, rows in self.tables.items()]
        pictures = [(caption, path) for caption, path in self.pictures.items() if path.exists()]
        parts += [_picture(caption, path.read_bytes()) for caption, path in pictures]
        parts += [_curves(title, history) for title, history in self.curves.items()]
        texts = [(title, text) for title, text in self.texts.items() if text]
        parts += [_section(title, f"<pre>{escape(text)}</pre>") for title, text in texts]
        warnings = [f'<p class="warning">{escape(text)}</p>' for text in self.warnings]
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        return PAGE.substitute(
            title=escape(f"hyperopt-peft {self.command}"),
            subtitle=escape(self.subtitle),
            verdict=escape(_sentence(self.verdict)),
            warnings="\n".join(warnings),
            body="\n".join(filter(None, parts)),
            settings=_html_table([["option", "value"], *chosen]),
            command=escape(" \\\n    ".join([f"hyperopt-peft {self.command}", *options])),
            versions=escape(f"Python {platform.python_version()}, {versions}"),
        )


def by_option(flags: Sequence[str]) -> list[str]:
    """``flags`` quoted for a shell, each option with its values; of a repeated one the last.

    Example:
        >>> by_option(["--rank=8", "--text_columns", "a", "b c", "--rank", "4"])
        ["--text_columns a 'b c'", '--rank 4']
    """
    options: dict[str, list[str]] = {}
    name = ""
    for flag in flags:
        if flag.startswith("--"):
            name = flag.partition("=")[0].replace("-", "_")
            options.pop(name, None)
        options.setdefault(name, []).append(flag)
    return [shlex.join(option) for option in options.values()]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def _html_table(rows: Sequence[Sequence[Any]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = []
        for column, cell in enumerate(row):
            last = str(rows[-1][column]) if column < len(rows[-1]) else ""
            numbers = last[:1].strip("–+-0123456789") == ""
            kind = ' class="number"' if column and numbers else ""
            cells.append(f"<{tag}{kind}>{escape(str(cell))}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


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
