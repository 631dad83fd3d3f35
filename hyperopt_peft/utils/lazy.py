"""Names that a package imports on their first use, since Transformers takes seconds to import."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__``, ``__all__`` of ``package``, from its ``TYPE_CHECKING`` block.

    The block's imports are all of the form ``from module import Name as Name``, which type checkers
    read as public names.

    Example:
        >>> import hyperopt_peft
        >>> hyperopt_peft.Engine.__module__, "Engine" in dir(hyperopt_peft)
        ('hyperopt_peft.engine.engine', True)
    """
    module = sys.modules[package]
    loader: Any = module.__spec__ and module.__spec__.loader
    blocks = [
        node.body
        for node in ast.parse(loader.get_source(package)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    nodes = [node for body in blocks for node in body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in nodes for alias in node.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: [*vars(module), *homes], [*homes]
