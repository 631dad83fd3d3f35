"""Files of a release: one version in all, and one list of the sets of packages."""

import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.matrix import NEWER_PYTHON, SETS
from tests.support.process import ROOT, python

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
#: Every public name of an installed package, from its own folder.
NAMES = """
import os, hyperopt_peft, hyperopt_peft.problems
assert hyperopt_peft.__file__.startswith(os.environ["PYTHONPATH"])
for module in (hyperopt_peft, hyperopt_peft.problems):
    assert all(hasattr(module, name) for name in module.__all__)
"""


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
    pythons = {name: NEWER_PYTHON.get(name, "3.11") for name in SETS}
    assert {each["set"]: each["python"] for each in sets} == pythons


def test_nothing_is_published_without_green_tests() -> None:
    jobs = read(ROOT / ".github/workflows/publish.yml")["jobs"]
    assert jobs["publish"]["needs"] == "build" and jobs["build"]["needs"] == "test"
    assert jobs["test"]["steps"][-1] == {"run": "bash .ci/run"}


def test_the_page_of_an_index_has_absolute_links_to_files_that_are_there(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    home = "https://host.example/owner/name"
    subprocess.run([ROOT / ".ci/absolute", tmp_path, home, "v1"], check=True)
    page = (tmp_path / "README.md").read_text()
    links = re.findall(r'\]\(([^)#][^)]*)\)|src="([^"]+)"', page)
    assert len(links) > 20
    for link in map("".join, links):
        assert link.startswith(("https://", f"{home}/")), link
        if link.startswith(f"{home}/"):
            kind, revision, file = link.removeprefix(f"{home}/").split("/", 2)
            assert kind == ("raw" if file.endswith(".svg") else "blob") and revision == "v1"
            assert (ROOT / file.partition("#")[0]).is_file(), link
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Repository"] == home and f"]({home})" in page


@pytest.mark.slow
def test_the_distributions_have_every_module_and_run(tmp_path: Path) -> None:
    """The wheel is built from the source distribution, as an installer does."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("hyperopt_peft", "problems"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as x; getattr(x, sys.argv[1])(sys.argv[2])"

    def built(kind: str, folder: Path) -> Path:
        python("-c", build, f"build_{kind}", tmp_path, folder=folder)
        (made,) = tmp_path.glob("*.tar.gz" if kind == "sdist" else "*.whl")
        return made

    with tarfile.open(built("sdist", source)) as archive:
        archive.extractall(tmp_path, filter="data")
    with zipfile.ZipFile(built("wheel", tmp_path / f"hyperopt_peft-{VERSION}")) as wheel:
        wheel.extractall(site)
    modules = {str(path.relative_to(source)) for path in source.glob("*/**/*.py")}
    installed = {str(path.relative_to(site)) for path in site.glob("**/*.py")}
    assert installed == {x.replace("problems/", "hyperopt_peft/problems/", 1) for x in modules}
    for program in (NAMES, "from hyperopt_peft.cli.main import main; main(['train', '--help'])"):
        python("-c", program, folder=tmp_path, PYTHONPATH=str(site))
