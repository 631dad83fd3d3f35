"""Files of a release: one version in all, and one list of the sets of packages."""

import tomllib
from pathlib import Path
from typing import Any

import yaml

from tests.matrix import NEWER_PYTHON, SETS

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_version_is_that_of_the_changelog_and_the_citation() -> None:
    headings = [x for x in (ROOT / "CHANGELOG.md").read_text().splitlines() if x.startswith("## ")]
    citation = read(ROOT / "CITATION.cff")
    assert headings[0] == "## [Unreleased]"
    assert headings[1] == f"## [{VERSION}] - {citation['date-released']}"
    assert citation["version"] == VERSION
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_weekly_job_runs_every_set_of_versions() -> None:
    (job,) = read(ROOT / ".github/workflows/matrix.yml")["jobs"].values()
    sets = job["strategy"]["matrix"]["include"]
    pythons = {name: "3.13" if name in NEWER_PYTHON else "3.11" for name in SETS}
    assert {each["set"]: each["python"] for each in sets} == pythons
