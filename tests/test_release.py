"""Files of a release: one version in all, workflows that are read and publish without a token."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.matrix import INTERPRETERS

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
FORMS = sorted(ROOT.glob(".github/**/*.yml"))
WORKFLOWS = {path.stem: path for path in FORMS if path.parent.name == "workflows"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_version_is_that_of_the_changelog_and_the_citation() -> None:
    headings = [x for x in (ROOT / "CHANGELOG.md").read_text().splitlines() if x.startswith("## ")]
    citation = read(ROOT / "CITATION.cff")
    assert headings[0] == "## [Unreleased]"
    assert headings[1] == f"## [{VERSION}] - {citation['date-released']}"
    assert citation["version"] == VERSION
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_a_contributor_is_told_the_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    command = readme.partition("<!-- command: test -->")[2].split("```")[1]
    assert command in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_every_form_and_workflow_is_read(path: Path) -> None:
    content = read(path)
    if path in WORKFLOWS.values():
        assert content[True]  # YAML 1.1 reads the key "on" as true
        assert content["permissions"] == {"contents": "read"}
        for job in content["jobs"].values():
            assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    elif path.stem != "config":
        assert {"name", "description", "body"} <= content.keys()
        assert all({"type", "id", "attributes"} <= part.keys() for part in content["body"])


def test_workflows_run_what_there_is() -> None:
    jobs = {name: read(path)["jobs"] for name, path in WORKFLOWS.items()}
    commands = {
        name: [s.get("run", "") for j in of.values() for s in j["steps"]]
        for name, of in jobs.items()
    }
    assert "bash .ci/run" in commands["ci"]
    sets = jobs["matrix"]["versions"]["strategy"]["matrix"]["include"]
    assert {each["set"]: f"python{each['python']}" for each in sets} == INTERPRETERS
    (publish,) = [job for of in jobs.values() for job in of.values() if "permissions" in job]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    assert all("run" not in step for step in publish["steps"])
    assert "secrets." not in "".join(path.read_text() for path in WORKFLOWS.values())
