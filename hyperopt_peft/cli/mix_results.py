"""What `hyperopt-peft mix` writes: weights, a picture of them, a verdict, and its page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hyperopt_peft.cli.report import PACKAGES, Report
from hyperopt_peft.problems.compare_baselines import BaselineComparison
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.trainer.logs import TIMINGS
from hyperopt_peft.utils.plots import lines

#: The sources' shares in a record of the Trainer's log.
SHARES = "shares"


@dataclass(frozen=True)
class Learned:
    """The learned weights.

    Attributes:
        counts: the rows of each source by name, and of the trusted ones.
        shares: the share of each in the training loss.
        row_weights: the weight of a row of each.
        steps: the updates of the weights.
    """

    counts: Mapping[str, int]
    shares: Mapping[str, float]
    row_weights: Mapping[str, float]
    steps: int

    @classmethod
    def of(cls, trainer: MixTrainer) -> Learned:
        """The weights of a ``trainer`` that has searched."""
        args = trainer.args
        steps = args.steps_of(len(trainer.train_dataset)) // args.lower_steps
        steps = args.search_steps if trainer.on_head else steps
        return cls(trainer.data.counts, trainer.shares(), trainer.row_weights(), steps)

    def record(self, folds: Sequence[Mapping[str, float]] = ()) -> dict[str, Any]:
        """The weights by source, with the row weights that each of ``folds`` has learned."""
        return {
            name: {
                "rows": self.counts[name],
                "share": self.shares[name],
                "row_weight": weight,
                **({"row_weight_of_folds": [fold[name] for fold in folds]} if folds else {}),
            }
            for name, weight in self.row_weights.items()
        }


def write_weights(learned: Learned, path: Path, folds: Sequence[Mapping[str, float]] = ()) -> None:
    """Write the weights as JSON."""
    record = {"upper_steps": learned.steps, "sources": learned.record(folds)}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Verdict:
    """Which method to use, by which the saved adapter is trained, and how to repeat the run.

    Attributes:
        learned: the weights.
        comparison: of the methods, or None.
        saved: the method of the saved adapter, or None.
        notes: reasons not to believe the weights.
        flags: the options of the run.
    """

    learned: Learned
    comparison: BaselineComparison | None
    saved: str | None
    notes: Sequence[str]
    flags: Sequence[str]

    @property
    def folds(self) -> Sequence[Mapping[str, float]]:
        """The weights that each fold has learned."""
        return self.comparison.row_weights if self.comparison else ()

    def __str__(self) -> str:
        folds = f"over {len(self.folds)} folds" if self.folds else ""
        lines = [
            f"weights after {self.learned.steps} updates",
            f"{'source':30}{'rows':>8}{'share':>9}{'row weight':>12}{folds:>18}",
        ]
        weights = self.learned.row_weights
        for name in sorted(weights, key=lambda each: -weights[each]):
            between = f"{self._between(name):>18}" if self.folds else ""
            share, rows = self.learned.shares[name], self.learned.counts[name]
            lines.append(f"{name[:29]:30}{rows:8}{share:9.3f}{weights[name]:12.3f}{between}")
        if self.comparison:
            lines += ["", f"by {len(self.folds)} folds of the trusted examples:"]
            lines.append(str(self.comparison))
        if self.saved:
            lines.append(f"the saved adapter: {self.saved}")
        return "\n".join([*lines, *(f"warning: {note}" for note in self.notes)])

    def write(self, folder: Path) -> None:
        """Write ``verdict.json``, and the folds' weights to ``weights.json``."""
        write_weights(self.learned, folder / "weights.json", self.folds)
        record = json.dumps(self.record(), indent=1)
        (folder / "verdict.json").write_text(f"{record}\n", encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """The verdict as plain values."""
        assert self.comparison is not None
        methods = [
            {
                "method": result.method,
                "trusted_loss": result.loss,
                "to_the_best": gap,
                "standard_error": error,
                "passes": result.passes,
                "losses": result.losses.tolist(),
            }
            for result, gap, error in _table(self.comparison)
        ]
        return {
            "recommended": self.comparison.recommended.method,
            "ties": [result.method for result in self.comparison.ties],
            "saved": self.saved,
            "sentence": self.comparison.sentence,
            "warnings": list(self.notes),
            "near_chance": self.comparison.near_chance,
            "methods": methods,
            "upper_steps": self.learned.steps,
            "sources": self.learned.record(self.folds),
            "options": list(self.flags),
            "versions": {name: version(name) for name in PACKAGES},
        }

    def report(self, folder: Path, metrics: Mapping[str, Any], curves: Mapping[str, Any]) -> Report:
        """The page of the run, whose pictures are in ``folder``, with the test's ``metrics``."""
        weights = self.learned.row_weights
        names = sorted(weights, key=lambda each: -weights[each])
        sentence = f"a row of {names[0]} counts most, {weights[names[0]]:.2f} times the mean row"
        tables: dict[str, list[list[Any]]] = {}
        if self.comparison:
            sentence = self.comparison.sentence
            title = f"Methods, by the loss of trusted examples out of {len(self.folds)} folds"
            heads = ["method", "trusted loss", "to the best, ± one standard error", "passes"]
            tables[title] = [heads, *self._methods()]
        counts, shares = self.learned.counts, self.learned.shares
        tables["Sources"] = [["source", "rows", "share", "row weight", "over the folds"]]
        for name in names:
            between = self._between(name) if self.folds else "–"
            numbers = [f"{shares[name]:.3f}", f"{weights[name]:.3f}", between]
            tables["Sources"].append([name, counts[name], *numbers])
        tested = {k: v for k, v in metrics.items() if not k.endswith((*TIMINGS, "epoch"))}
        if tested:
            numbers = [f"{value:.4f}" for value in tested.values()]
            tables["Test examples"] = [[k.removeprefix("eval_") for k in tested], numbers]
        return Report(
            "mix",
            sentence,
            self.flags,
            subtitle=f"the saved adapter: {self.saved or 'none'}",
            warnings=self.notes,
            curves=curves,
            pictures={"The share of each source": folder / "weights.png"},
            tables=tables,
        )

    def _methods(self) -> list[list[Any]]:
        """The cells of each method of the comparison, the best first."""
        assert self.comparison is not None
        return [
            [
                result.method,
                f"{result.loss:.4f}",
                "–" if result is self.comparison.best else f"{gap:+.4f} ± {error:.4f}",
                result.passes,
            ]
            for result, gap, error in _table(self.comparison)
        ]

    def _between(self, name: str) -> str:
        """The range of a source's weight over the folds."""
        values = [fold[name] for fold in self.folds]
        return f"{min(values):.3f} to {max(values):.3f}"


def _table(comparison: BaselineComparison) -> list[tuple[Any, float, float]]:
    """Each result with its difference to the best and the standard error, the best first."""
    results = sorted(comparison.results, key=lambda result: result.loss)
    return [(result, *result.difference(comparison.best)) for result in results]


def draw_shares(shares: Sequence[Mapping[str, float]], path: Path) -> None:
    """The share of each source before each update of the weights, and after the last."""
    updates = range(len(shares))
    named = {f"{x}, {shares[-1][x]:.3f}": (updates, [y[x] for y in shares]) for x in shares[0]}
    ylabel = "share in the training loss"
    lines({"": named}, path, xlabel="update of the weights", ylabel=ylabel)
