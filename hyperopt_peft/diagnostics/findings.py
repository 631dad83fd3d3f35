"""The findings of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hyperopt_peft.diagnostics.curvature import Curvature

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One finding: its kind, the name of the level, a description (``words``), and advice.

    The severity is ``"error"`` if training fails or hypergradients are wrong, and ``"warning"`` if
    hypergradients are inaccurate or useless.
    """

    kind: str
    severity: Severity
    level: str
    words: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.level}: {self.words}; {self.advice}"


@dataclass(frozen=True)
class Check:
    """The findings, by severity, and two measurements, which an error may prevent.

    ``signal_to_noise`` of the hypergradient is None without several batches of a level, and ∞ if
    the hypergradients of all batches are equal. ``not_compared`` says why derivatives were not
    compared with differences; it is empty if they were.
    """

    findings: tuple[Finding, ...]
    curvature: Curvature | None = None
    signal_to_noise: float | None = None
    not_compared: str = ""

    @property
    def ok(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def __str__(self) -> str:
        lines = [*map(str, self.findings)] or ["no problem was found"]
        lines += [] if self.curvature is None else [str(self.curvature)]
        if self.signal_to_noise is not None:
            lines.append(f"signal-to-noise ratio of the hypergradient {self.signal_to_noise:.2g}")
        if self.not_compared:
            lines.append(f"derivatives were not compared with differences ({self.not_compared})")
        return "\n".join(lines)
