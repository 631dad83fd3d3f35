"""Text from a package that is installed anyway, in a fixed order."""

from __future__ import annotations

import ast
import importlib.util
import random
from pathlib import Path


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


def _mixed(texts: dict[str, None]) -> list[str]:
    return random.Random(0).sample(sorted(texts), len(texts))
