"""`AcrossBudgets`: the comparisons of the same methods at several budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hyperopt_peft.comparison.result import Comparison


@dataclass
class AcrossBudgets:
    """The same methods compared at several budgets.

    Attributes:
        comparisons: by the passes of a run.
    """

    comparisons: Mapping[float, Comparison]
