"""What `hyperopt-peft mix` writes: weights, a picture of them, a verdict, and its page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperopt_peft.cli.report import Report
from hyperopt_peft.problems.compare_baselines import BaselineComparison
from hyperopt_peft.problems.mix_trainer import MixTrainer
from hyperopt_peft.trainer.logs import TIMINGS
from hyperopt_peft.utils.plots import lines
from hyperopt_peft.utils.tables import aligned

#: The sources' shares in a record of the Trainer's log.
SHARES = "shares"


@dataclass
class Verdict:
    """The learned weights; then which method to use, and by which the saved adapter is trained.

    Attributes:
        sources: by name the rows, the share in the training loss, and the weight of a row.
        steps: the updates of the weights.
        flags: the options of the run.
        comparison: of the methods, or None.
        saved: the method of the saved adapter, or None.
        notes: reasons not to believe the weights.
    """

    sources: dict[str, dict[str, Any]]
    steps: int
    flags: Sequence[str] = ()
    comparison: BaselineComparison | None = None
    saved: str | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, trainer: MixTrainer, flags: Sequence[str]) -> Verdict:
        """The weights of a ``trainer`` that has searched."""
        args, shares = trainer.args, trainer.shares()
        steps = args.steps_of(len(trainer.train_dataset)) // args.lower_steps
        sources = {
            name: {"rows": trainer.data.counts[name], "share": shares[name], "row_weight": weight}
            for name, weight in trainer.row_weights().items()
        }
        return cls(sources, trainer.head_mix.steps if trainer.on_head else steps, flags)

    def compared(self, comparison: BaselineComparison) -> None:
        """Add the ``comparison``, and to each source the weights that its folds have learned."""
        self.comparison = comparison
        for name, source in self.sources.items():
            source["row_weight_of_folds"] = [fold[name] for fold in comparison.row_weights]

    def __str__(self) -> str:
        blocks = [f"weights after {self.steps} updates\n{aligned(self._table())}"]
        if self.comparison:
            folds = len(self.comparison.row_weights)
            blocks.append(f"by {folds} folds of the trusted examples:\n{self.comparison}")
        return "\n\n".join([*blocks, *(f"warning: {note}" for note in self.notes)])

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        record: dict[str, Any] = {"upper_steps": self.steps, "sources": self.sources}
        record |= {"saved": self.saved, "warnings": [*self.notes], "options": [*self.flags]}
        if found := self.comparison:
            record |= {
                "recommended": found.recommended.method,
                "ties": [result.method for result in found.ties],
                "sentence": found.sentence,
                "near_chance": found.near_chance,
                "methods": self._methods(),
            }
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def report(self, folder: Path, metrics: Mapping[str, Any], curves: Mapping[str, Any]) -> Report:
        """The page of the run, whose pictures are in ``folder``, with the test's ``metrics``."""
        sources = self._table()
        sentence = f"a row of {sources[1][0]} counts most, {sources[1][3]} times the mean row"
        tables = dict[str, list[list[Any]]]()
        if self.comparison:
            sentence = self.comparison.sentence
            title = "Methods, by the loss of trusted examples in folds"
            tables[title] = [
                ["method", "trusted loss", "to the best, ± one standard error", "passes"]
            ]
            for each in sorted(self.comparison.results, key=lambda result: result.loss):
                gap = self.comparison.to_the_best(each)
                tables[title].append([each.method, f"{each.loss:.4f}", gap, each.passes])
        tables["Sources"] = sources
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

    def _table(self) -> list[list[Any]]:
        """A line for each source, the largest weight first."""
        lines = [["source", "rows", "share", "row weight", "over the folds"]]
        for name, each in sorted(self.sources.items(), key=lambda item: -item[1]["row_weight"]):
            folds = each.get("row_weight_of_folds")
            between = f"{min(folds):.3f} to {max(folds):.3f}" if folds else "–"
            numbers = f"{each['share']:.3f}", f"{each['row_weight']:.3f}"
            lines.append([name, each["rows"], *numbers, between])
        return lines

    def _methods(self) -> list[dict[str, Any]]:
        """The numbers of each method of the comparison, the best first."""
        assert self.comparison is not None
        methods = []
        for result in sorted(self.comparison.results, key=lambda result: result.loss):
            gap, error = result.difference(self.comparison.best)
            numbers = {"trusted_loss": result.loss, "to_the_best": gap, "standard_error": error}
            more = {"passes": result.passes, "losses": result.losses.tolist()}
            methods.append({"method": result.method, **numbers, **more})
        return methods


def draw_shares(shares: Sequence[Mapping[str, float]], path: Path) -> None:
    """The share of each source before each update of the weights, and after the last."""
    updates = range(len(shares))
    named = {f"{x}, {shares[-1][x]:.3f}": (updates, [y[x] for y in shares]) for x in shares[0]}
    ylabel = "share in the training loss"
    lines({"": named}, path, xlabel="update of the weights", ylabel=ylabel)
