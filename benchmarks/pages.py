"""Writes tables between two marks of a page in docs, or checks them against the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import table

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks/results"
BEGIN, END = "<!-- {} table -->", "<!-- end of {} table -->"


def between(page: str, text: str, name: str) -> str:
    """``page`` with ``text`` between the marks of a table.

    Raises:
        SystemExit: the page has no such marks.

    Example:
        >>> between("<!-- a table -->old<!-- end of a table -->", "new", "a").split()[3]
        '-->'
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, mark, rest = page.partition(begin)
    if not mark or end not in rest:
        raise SystemExit(f"the page has no place for the tables: {begin}, {end}")
    return f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}"


def write(path: Path, sections: Mapping[str, str], *, check: bool) -> None:
    """Put each section between its marks.

    Raises:
        SystemExit: with ``check``, if the page would change; nothing is written then.
    """
    page = path.read_text()
    for name, text in sections.items():
        page = between(page, text, name)
    if page == path.read_text():
        return
    if check:
        raise SystemExit(f"{path.name} is not what the results give: run the report")
    path.write_text(page)


def titled(tables: Mapping[str, Sequence[Mapping[str, Any]]], measured: Mapping[str, Any]) -> str:
    """Tables with their titles, and the machine that they were measured on."""
    texts = [f"**{title}**\n\n{table(rows)}\n" for title, rows in tables.items()]
    return "\n".join([*texts, machine_line(measured)])


def machine_line(measured: Mapping[str, Any]) -> str:
    """A sentence about the machine and the versions, from `measure.environment`."""
    machine = measured["machine"]
    found = {**measured["versions"], "hyperopt-peft at commit": measured.get("commit")}
    versions = ", ".join(f"{name} {v}" for name, v in found.items() if v)
    return (
        f"Measured on {machine['cores']} shared cores of a virtual machine "
        f"({machine['processor']}), "
        f"{machine['threads']} threads, {machine['name'] or 'no GPU'}, "
        f"Python {machine['python']}; {versions}.\n"
    )
