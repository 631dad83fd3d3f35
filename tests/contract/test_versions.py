"""What pyproject.toml promises: the set that runs here is inside, and the page says the same."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.matrix import NEWER_PYTHON, PACKAGES, bounds, lower_bounds, pins

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = {one.name: one.specifier for one in map(Requirement, bounds())}


@pytest.mark.parametrize("package", BOUNDS)
def test_the_installed_version_is_promised(package: str) -> None:
    assert BOUNDS[package].contains(version(package).partition("+")[0])


def test_the_page_has_the_bounds_of_the_project() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", page, re.MULTILINE))
    assert rows.pop("Python") == PROJECT["requires-python"].removeprefix(">=")
    assert rows.keys() == set(PACKAGES) - {"trl"}  # has no bound
    for package, low in rows.items():
        assert Requirement(f"{package}>={low}").specifier == BOUNDS[package]


def test_the_oldest_set_is_that_of_the_lower_bounds() -> None:
    pinned = {one.name: one.specifier for one in map(Requirement, lower_bounds())}
    assert pinned.keys() == BOUNDS.keys()
    for package, pin in pinned.items():
        (exact,) = pin
        assert exact.operator == "==" and BOUNDS[package].contains(exact.version)


def test_an_extra_does_not_ask_for_a_release_that_a_host_refuses() -> None:
    """Else an installer takes a release of the host from before it had requirements."""
    (trl,) = map(Requirement, PROJECT["optional-dependencies"]["trl"])
    assert not trl.specifier


def test_no_bound_is_an_upper_one() -> None:
    assert {clause.operator for specifier in BOUNDS.values() for clause in specifier} == {">="}


# A program in which people fine-tune, and the set of the matrix with its versions.
HOSTS = {
    "axolotl 0.19.0": "axolotl",
    "axolotl 0.21.0": "axolotl-0.21",
    "unsloth 2026.10.9": "unsloth",
    "ms-swift 4.6.0": "ms-swift",
    "llamafactory 0.9.5": "llamafactory",
}


@pytest.mark.parametrize("host", HOSTS)
def test_the_requirements_of_a_host_and_ours_have_versions_in_common(host: str) -> None:
    """What the matrix ran is among them, and so is a version of each package it leaves open."""
    wheel = json.loads(Path(__file__).with_name("hosts.json").read_text())[host]
    theirs = {one.name: one.specifier for one in map(Requirement, wheel["requires"])}
    ran = {one.name: one.specifier for one in map(Requirement, pins(HOSTS[host]))}
    python = NEWER_PYTHON.get(HOSTS[host], "3.11")
    for required in (wheel["python"], PROJECT["requires-python"]):
        assert SpecifierSet(required).contains(python)
    for package in theirs.keys() & BOUNDS.keys():
        both = theirs[package] & BOUNDS[package]
        versions = {clause.version for clause in ran.get(package, ()) if clause.operator == "=="}
        if not versions:
            versions = {clause.version for clause in both} | {version(package).partition("+")[0]}
        assert any(both.contains(each) for each in versions), (package, str(both))
