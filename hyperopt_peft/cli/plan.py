"""``--dry_run``: what a command would train, on how many rows and steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from hyperopt_peft.cli.text.setup import Setup
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.tables import aligned


@dataclass(frozen=True)
class Work:
    """Trainings of one kind, and the steps of each."""

    name: str
    trainings: int
    steps: int


def plan(works: Sequence[Work]) -> str:
    """``works`` in a table."""
    rows = [(work.name, work.trainings, work.steps) for work in works]
    return aligned([("", "trainings", "steps"), *rows])


def phases(trainer: BilevelTrainer) -> list[Work]:
    """The trainings of one run of ``trainer``."""
    rows = len(trainer.train_dataset)
    steps = trainer.args.steps_of(rows)
    if trainer.upper is None:
        return [Work("training", 1, steps)]
    works = [Work("search", 1, steps)]
    if trainer.has_second_phase:
        rows += len(trainer.upper_dataset)
        with suppress(AttributeError):  # of what `finish` learns
            rows = len(trainer.all_rows())
        works.append(Work("retraining", 1, trainer.args.for_retraining().steps_of(rows)))
    return works


def levels(setup: Setup, trainer: BilevelTrainer) -> str:
    """Parameters, examples and steps in lines; a search without an upper step is a ProblemError."""
    works = phases(trainer)
    rows = len(trainer.train_dataset)
    lines = [f"method: {trainer.method}"]
    trained = {"trained": trainer.lower.variables}
    counts = {"training": rows}
    if trainer.upper is not None:
        trainer.require_upper_step(works[0].steps)
        trained = {"upper level": trainer.upper.variables, "lower level": trainer.lower.variables}
        counts = {"lower level": rows, "upper level": len(trainer.upper_dataset)}
        counts["retraining"] = sum(counts.values()) if works[1:] else 0
        updates = works[0].steps // trainer.args.lower_steps
        lines.append(f"estimator: {trainer.args.hypergradient}, for {updates} updates")
    counts["evaluation"] = len(setup.evaluation or ())
    sizes = [f"{sum(x.numel() for x in xs):,} {name}" for name, xs in trained.items()]
    lines.append(f"parameters: {', '.join(sizes)}")
    lines.append(f"examples: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    if setup.task.classes:
        lines.append(f"labels: {', '.join(setup.config.id2label.values())}")
    return "\n".join(lines)
