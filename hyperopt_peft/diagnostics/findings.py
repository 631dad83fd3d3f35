"""What a check found, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hyperopt_peft.diagnostics.curvature import Curvature

Severity = Literal["error", "warning", "note"]
Kind = Literal[
    "shared tensor",
    "bad loss",
    "not finite",
    "in-place edit",
    "not reproducible",
    "unread variable",
    "no implicit term",
    "no mixed derivative",
    "no double backward",
    "negative curvature",
    "ill-conditioned",
    "far from stationary",
    "random",
    "buffers",
    "no optimizer",
]


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    ``level`` is the level's name, ``words`` say what is so, ``advice`` what to do. An
    ``"error"`` stops training or makes hypergradients wrong, a ``"warning"`` makes them poor
    or pointless, a ``"note"`` is taken care of, or is for you to know.
    """

    kind: Kind
    severity: Severity
    level: str
    words: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.level}: {self.words}; {self.advice}"


@dataclass(frozen=True)
class Check:
    """The findings, worst first; ``curvature`` is None where an error came before it."""

    findings: tuple[Finding, ...]
    curvature: Curvature | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no errors and no warnings; notes do not count."""
        return all(finding.severity == "note" for finding in self.findings)

    def __str__(self) -> str:
        lines = [*map(str, self.findings)] or ["nothing was found"]
        return "\n".join([*lines, *([] if self.curvature is None else [str(self.curvature)])])
