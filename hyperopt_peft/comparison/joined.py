"""`Joined`: several comparisons of the same methods as one, whose tables are stacked."""

from __future__ import annotations

from collections.abc import Mapping
from operator import methodcaller
from typing import Any, ClassVar

from hyperopt_peft.comparison.result import Comparison, Row


class Joined(Comparison):
    """Comparisons of the same methods, which differ in their task or their budget.

    Attributes:
        comparisons: by task or budget.
    """

    #: What the comparisons differ in, how its names are shown, and how they begin a remark.
    key: ClassVar[str]
    form: ClassVar[str] = ""
    lead: ClassVar[str] = "{}"
    comparisons: Mapping[Any, Comparison]

    def stacked(self, table: str, *arguments: Any) -> list[Row]:
        """The rows of the ``table`` of each comparison, after the name of the comparison."""
        tables = {
            name: methodcaller(table, *arguments)(each) for name, each in self.comparisons.items()
        }
        heads, one = next(iter(tables.values()))[0], next(iter(self.comparisons.values()))._score
        rows = [
            [f"{name:{self.form}}", *row] for name, (_, *rows) in tables.items() for row in rows
        ]
        return [[self.key, *(self._score if head == one else head for head in heads)], *rows]

    def rates(self) -> list[Row]:
        """As `Comparison.rates`, of each."""
        return self.stacked("rates")

    def upper_level(self) -> list[Row]:
        """As `Comparison.upper_level`, of each."""
        return self.stacked("upper_level")

    def spent(self) -> list[Row]:
        """As `Comparison.spent`, of each."""
        return self.stacked("spent")

    def searched(self, groups: Mapping[str, Any] | None = None) -> list[Row]:
        """As `Comparison.searched`, of each."""
        return self.stacked("searched", groups)

    def remarks(self) -> list[str]:
        """As `Comparison.remarks`, after the names of comparisons where these are not all."""
        names: dict[str, list[str]] = {}
        for name, each in self.comparisons.items():
            for remark in each.remarks():
                names.setdefault(remark, []).append(f"{name:{self.form}}")
        every = len(self.comparisons)
        leads = {x: self.lead.format(", ".join(n)) for x, n in names.items() if len(n) < every}
        return [f"{leads[x]}: {x}" if x in leads else x for x in names]
