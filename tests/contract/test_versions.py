"""What pyproject.toml promises: the set that runs here is inside, and the page says the same."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.matrix import PACKAGES, bounds, lower_bounds

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = {one.name: one.specifier for one in map(Requirement, bounds())}


@pytest.mark.parametrize("package", BOUNDS)
def test_the_installed_version_is_promised(package: str) -> None:
    assert BOUNDS[package].contains(version(package).partition("+")[0])


def test_the_page_has_the_bounds_of_the_project() -> None:
    page = (ROOT / "docs" / "versions.md").read_text().partition("## Test results")[0]
    rows = dict(re.findall(r"^\| (\w+) \| ([\d. |]*?) *\|$", page, re.MULTILINE))
    python = rows.pop("Python")
    assert python.strip(" |") == PROJECT["requires-python"].removeprefix(">=")
    assert rows.keys() == set(PACKAGES) - {"numpy"}
    for package, cells in rows.items():
        low, _, high = (cell.strip() for cell in cells.partition("|"))
        said = f">={low},<{high}" if high else f">={low}"
        assert Requirement(f"{package}{said}").specifier == BOUNDS[package]


def test_the_oldest_set_is_that_of_the_lower_bounds() -> None:
    pinned = {one.name: one.specifier for one in map(Requirement, lower_bounds())}
    assert pinned.keys() == BOUNDS.keys()
    for package, pin in pinned.items():
        (exact,) = pin
        assert exact.operator == "==" and BOUNDS[package].contains(exact.version)
