"""The printed lines, the page and the files of `attribute`, as soon as each part is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hyperopt_peft.attribution import Attribution, Reasons
from hyperopt_peft.attribution.suspects import Suspects
from hyperopt_peft.cli.report import Report, as_text
from hyperopt_peft.cli.text import attributed
from hyperopt_peft.utils.tables import cells, write_csv

#: The rows in a table, and at each end of the picture.
SHOWN = 10
EVIDENCE = ["likely_label", "label_confidence", "training_loss", "score"]
TERMS = """likely_label: the guess of models that did not train on the row; compare it with the text
label_confidence: the probability that these models give to the row's own label
training_loss: high where the training could not fit the row
score: how fast the loss on the evaluation rows rises with the row's weight; above 0: harmful"""


@dataclass
class Answers:
    """The answers from the scores in ``result``.

    Attributes:
        folder: of the files; None in all processes but one.
        scored_on: digests of the evaluation rows, see `attributed`.
        classes: the label as the files have it, by its number.
        again: the command that trains on corrected labels.
    """

    result: Attribution
    command: Any
    page: Report
    folder: Path | None
    scored_on: set[str]
    classes: Mapping[int, Any]
    again: str
    columns: dict[str, list[Any]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def paragraphs(self, seed: int, reasons: Callable[[], Reasons] | None) -> Iterator[str]:
        """The paragraphs to print, the first of which says what to do."""
        result, command = self.result, self.command
        self.page.verdict = self._hurting()
        self.page.details = {"Run": self._run()}
        text = self.add({}, settings=result.settings, evaluation_loss=result.value)
        if command.suspects:
            yield from self._cost("suspects", command.suspects)
            text = self._suspects(result.suspects(command.suspects, seed=seed))
        yield f"{self.page.verdict}\n{text}".rstrip()
        trust = f"unknown: --check 20 tells, by 20 trainings ({self._minutes(20)})"
        if command.check:
            yield from self._cost("check", command.check)
            check = result.check(command.check, seed=seed)
            trust, self.record["check"] = check.verdict, check.record()
            self.page.details["Check"] = str(check)
        parts: dict[str, Any] = {"Can the scores be trusted?": trust}
        for name, rows in zip(("harmful", "helpful"), result.ends(SHOWN), strict=True):
            lines = [[*self._cells(row), f"{result.scores[row]:+.1e}"] for row in rows]
            parts[f"Most {name} rows"] = [["row", *result.columns, "score"], *lines]
        yield self.add(parts)
        if reasons is not None:
            yield self._reasons(reasons())
        if command.details:
            yield as_text(self.page.details)

    def add(self, sections: Mapping[str, Any], **record: Any) -> str:
        """Write the files again, with ``sections`` at the end of the page; these as text."""
        self.record |= record
        self.page.sections = {**self.page.sections, **sections}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            digests = attributed.as_column(self.scored_on, len(self.result.scores))
            columns = {**self.columns, attributed.COLUMN: digests}
            escape = self.command.escape_formulas
            self.result.to_csv(self.folder / "attribution.csv", columns, escape_formulas=escape)
            self.result.plot(self.folder / "attribution.png", SHOWN)
            (self.folder / "attribution.json").write_text(f"{json.dumps(self.record, indent=1)}\n")
            self.page.write(self.folder)
        return as_text(sections)

    def _suspects(self, suspects: Suspects) -> str:
        """Add the doubtful labels to page and files; what to do about them."""
        result, twins = self.result, self.columns[attributed.SAME_TEXT]
        confidence, losses = suspects.confidence.tolist(), result.losses.tolist()
        doubtful = {*suspects.flagged, *(row for row, twin in enumerate(twins) if twin != "")}
        flagged = sorted(doubtful, key=confidence.__getitem__)
        suspects = replace(suspects, flagged=flagged)
        self.columns["suspect"] = [int(row in doubtful) for row in range(len(confidence))]
        self.columns["label_confidence"] = confidence
        self.page.details["Search for wrong labels"] = suspects.numbers
        if not flagged:
            return self.add({"Wrong labels": suspects.verdict}, suspects=suspects.record())
        guesses = suspects.probabilities.argmax(1).tolist()
        heads = ["row", *result.columns, *EVIDENCE]
        lines, shown = list[list[Any]](), list[list[Any]]()
        digests = attributed.as_column(self.scored_on, len(flagged))
        for row, digest in zip(flagged, digests, strict=True):
            entries = [values[row] for values in result.columns.values()]
            numbers = confidence[row], losses[row], float(result.scores[row])
            guess = self.classes[guesses[row]]
            lines.append([result.numbers[row], *entries, guess, *numbers, twins[row], digest])
            texts = (f"{x:{form}}" for x, form in zip(numbers, (".2f", ".2f", "+.1e"), strict=True))
            shown.append([*self._cells(row), guess, *texts])
        if self.folder is not None:
            path, escape = self.folder / "suspects.csv", self.command.escape_formulas
            names = [*heads, attributed.SAME_TEXT, attributed.COLUMN]
            write_csv(path, names, lines, escape_formulas=escape)
        self.page.verdict = (
            f"Read the {len(flagged)} of {len(confidence)} rows whose labels may be wrong, in "
            f"suspects.csv, worst first; stop after ten right labels in a row. Correct the column "
            f"{[*result.columns][-1]!r}, and train again."
        )
        parts = {"Train again": self.again, "The most doubtful labels": [heads, *shown[:SHOWN]]}
        parts["Terms"] = TERMS
        return self.add(parts, suspects=suspects.record())

    def _reasons(self, reasons: Reasons) -> str:
        if self.folder is not None:
            escape = self.command.escape_formulas
            reasons.to_csv(self.folder / "why.csv", escape_formulas=escape)
            if any(reason.rows for reason in reasons):
                reasons.plot(self.folder / "why.png")
                self.page.pictures = {**self.page.pictures, "Why these predictions": "why.png"}
        return self.add({"Why these predictions": str(reasons)})

    def _cells(self, row: int) -> list[Any]:
        each = (cells({name: values}, row, 60) for name, values in self.result.columns.items())
        return [self.result.numbers[row], *each]

    def _minutes(self, trainings: int) -> str:
        return f"about {trainings * self.result.settings['seconds'] / 60:.1f} minutes"

    def _cost(self, name: str, trainings: int) -> Iterator[str]:
        """A line before what takes a minute or more."""
        if trainings * self.result.settings["seconds"] >= 60:
            yield f"{name}: {trainings} trainings, {self._minutes(trainings)}"

    def _hurting(self) -> str:
        """How many rows are harmful, and what to do about them."""
        scores, unseen = self.result.scores, self.result.settings["unseen"]
        text = (
            f"Read the most harmful rows: {int((scores > 0).sum())} of {len(scores) - unseen} "
            "training rows raise the loss on the evaluation rows (score > 0)"
        )
        return f"{text}; {unseen} were never trained on: train for longer" if unseen else text

    def _run(self) -> str:
        """The numbers of the run and of the solver."""
        settings = self.result.settings
        trained = f"{settings['steps']} steps"
        if self.command.score_model == "head":
            trained = f"a linear head at its minimum, with the penalty λ = {settings['l2']:g}"
            if end := settings["l2_end"]:
                trained += f" (the {end} one tried)"
        text = (
            f"{settings['rows']} training rows, {trained}, {settings['variables']:,} parameters; "
            f"scores by {settings['estimator']}\n"
            f"loss on the evaluation rows: {self.result.value:.4f}"
        )
        if (residual := settings.get("residual")) is not None:
            text += f"\nrelative residual of the solver: {residual:.2g}"
        return text + (f"\nnote: {note}" if (note := settings.get("note")) else "")
