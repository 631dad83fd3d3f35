"""``report.md``: a page about a run, with the pictures beside it."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperopt_peft.utils.plots import LOSSES, level_curves
from hyperopt_peft.utils.versions import versions


@dataclass
class Report:
    """What a page shows.

    Attributes:
        verdict: the result in a sentence.
        tables: rows of cells by title, the heads first.
        pictures: files in the page's folder by caption.
        curves: the logs of the phases by title, of which both levels' losses are drawn.
        texts: what is shown as it was printed, by title.
    """

    command: str
    verdict: str
    options: Mapping[str, Sequence[str]]
    subtitle: str = ""
    tables: Mapping[str, Sequence[Sequence[Any]]] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: str | Path) -> Path:
        """Write the page and the curves to ``folder``; the path of the page."""
        folder, pictures = Path(folder), dict(self.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for title, history in self.curves.items():
            if any(sum(key in record for record in history) > 1 for key in LOSSES):
                pictures[title] = f"{title.lower()}.png"
                level_curves(history, folder / pictures[title])
        name = "check.md" if self.command == "check" else "report.md"
        (folder / name).write_text(self.text(pictures), encoding="utf-8")
        return folder / name

    def text(self, pictures: Mapping[str, str]) -> str:
        """The page."""
        again = [f"hyperopt-peft {self.command}"]
        again += [shlex.join([f"--{name}", *words]) for name, words in self.options.items()]
        found = ", ".join(map(" ".join, versions().items()))
        parts = [f"# {again[0]}", self.subtitle, f"**{self.verdict}**"]
        for title, (heads, *rows) in self.tables.items():
            lines = [heads, ["---"] * len(heads), *rows]
            cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
            parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in cells)]
        parts += [f"![{caption}]({path})" for caption, path in pictures.items()]
        for title, text in {**self.texts, "The same run again": " \\\n  ".join(again)}.items():
            parts += [f"## {title}", f"~~~~\n{text}\n~~~~"]
        return "\n\n".join([*parts, f"Python {platform.python_version()}, {found}\n"])
