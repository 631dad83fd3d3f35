"""The documentation builds as a site without a warning, and describes every public name."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("myst_nb", reason="Sphinx is an extra")
from sphinx.util.inventory import InventoryFile

from tests.support.process import python

pytestmark = pytest.mark.slow  # a process of its own
MODULES = ["", ".adapters", ".diagnostics", ".hypergradients", ".problems"]


def names_of(module: str) -> set[str]:
    """The public classes and functions of a module, with its name."""
    found = importlib.import_module(module)
    return {f"{module}.{name}" for name in found.__all__ if callable(getattr(found, name))}


def test_every_public_name_is_described(tmp_path: Path) -> None:
    build = ("-m", "sphinx", "-W", "--keep-going", "-q", "docs", tmp_path)
    python(*build, PYTHONDONTWRITEBYTECODE="1")
    inventory = InventoryFile.loads((tmp_path / "objects.inv").read_bytes(), uri="").data
    described = {name for kind, names in inventory.items() if kind[:3] == "py:" for name in names}
    public = {name for suffix in MODULES for name in names_of("hyperopt_peft" + suffix)}
    assert {name.rpartition(".")[2] for name in public - described} <= {
        name.rpartition(".")[2] for name in public & described
    }  # a name of two modules is described once
