"""What pages and docstrings name exists: links, modules, paths, estimators and papers."""

import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from hyperopt_peft.comparison import find as methods
from hyperopt_peft.hypergradients import get_estimator, registered, registry
from tests.support.documents import ROOT

README = [ROOT / folder / "README.md" for folder in (".", "benchmarks", "examples/recipes/glue")]
FILES = [*README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = pytest.mark.parametrize("page", FILES, ids=lambda page: str(page.relative_to(ROOT)))
#: An option whose value is written out, and not a letter for any value.
VALUE = r"\w+=(?:[-\d.]+(?:e-?\d+)?|true|false|lr|exact|difference|forward|central)"
BIB = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", BIB, re.M | re.S)
NUMBER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code(page: Path) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`]+)`", prose)


@PAGES
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]*)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@PAGES
def test_dotted_names_import(page: Path) -> None:
    groups = {methods.GROUP, registry.GROUP}  # of entry points
    for name in {*re.findall(r"\bhyperopt_peft(?:\.\w+)+", page.read_text())} - groups:
        module, _, attribute = name.rpartition(".")
        program = module.rpartition(".")[2]  # of a plug-in, which imports it
        if "integrations" in module and importlib.util.find_spec(program) is None:
            continue
        if not hasattr(importlib.import_module(module), attribute):
            importlib.import_module(name)


@PAGES
def test_paths_exist(page: Path) -> None:
    names = set(re.findall(r"\b(?:tests|benchmarks|examples)/[\w./]*\.\w+", page.read_text()))
    for name in names | {word for word in code(page) if re.fullmatch(r"(\w+/)+\w+\.py", word)}:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "hyperopt_peft")), name


@PAGES
def test_estimators_are_known(page: Path) -> None:
    known = "|".join(registered())
    for word in code(page):
        if re.fullmatch(rf"(?:{known}):{VALUE}(?:,{VALUE})*", word):
            get_estimator(word)


def test_every_cited_number_has_one_entry() -> None:
    files = [*(ROOT / "hyperopt_peft").rglob("*.py"), *(ROOT / "problems").rglob("*.py")]
    files += [*(ROOT / "examples").rglob("*.py"), ROOT / "docs" / "mathematics.md"]
    cited = {number for file in files for number in NUMBER.findall(file.read_text("utf-8"))}
    entries = Counter(re.findall(r"eprint = \{(.*)\}", BIB))
    assert {*entries} == cited and {*entries.values()} == {1}


def test_every_entry_is_whole() -> None:
    assert len({key for key, _ in ENTRIES}) == BIB.count("\n@") + 1
    for key, body in ENTRIES:
        names = set(re.findall(r"^  (\w+) = \{.*\},$", body, re.M))
        assert {"author", "title", "year"} <= names, key
        assert body.count("{") == body.count("}"), key
