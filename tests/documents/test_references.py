"""docs/references.bib has an entry for every paper that a docstring cites."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIB = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", BIB, re.M | re.S)
NUMBER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


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
