"""``--dry_run``: what a command would train, on how many rows and steps, and for how long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from itertools import cycle, islice
from typing import Any

from hyperopt_peft.cli.text.setup import Setup
from hyperopt_peft.trainer.passes import passes_of_a_cycle
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.models import base_model
from hyperopt_peft.utils.tables import aligned

#: Batches that are timed, after a first one.
TIMED = 2


@dataclass(frozen=True)
class Work:
    """Trainings of one kind; each sends ``batches`` of one device forward and backward."""

    name: str
    trainings: int
    steps: int
    batches: float


def plan(works: Sequence[Work], trainer: BilevelTrainer) -> str:
    """``works`` and their time in a table, by timed batches of ``trainer``."""
    seconds = seconds_a_batch(trainer)
    minutes = [work.trainings * work.batches * seconds / 60 for work in works]
    rows: list[Sequence[Any]] = [("", "trainings", "steps", "minutes")]
    rows += [(w.name, w.trainings, w.steps or "", f"{m:.1f}") for w, m in zip(works, minutes)]
    total = f"together about {sum(minutes):.1f} minutes as measured now, without evaluation"
    return f"{aligned(rows)}\n{total}"


def seconds_a_batch(trainer: BilevelTrainer) -> float:
    """The mean time of a batch forward and backward; gradients are None again afterwards."""
    model = trainer.model.to(trainer.args.device)
    names = signature(base_model(model).forward).parameters
    begin = 0.0
    for number, batch in enumerate(islice(cycle(trainer.get_train_dataloader()), TIMED + 1)):
        inputs = {k: v.to(trainer.args.device) for k, v in batch.items() if k in names}
        with trainer.compute_loss_context_manager():
            loss = model(**inputs).loss
        loss.backward()
        float(loss.detach())  # waits for the device
        if number == 0:  # which allocates, and may compile
            begin = time.perf_counter()
    model.zero_grad()
    return (time.perf_counter() - begin) / TIMED


def phases(trainer: BilevelTrainer) -> list[Work]:
    """The trainings of one run of ``trainer``."""
    args, rows = trainer.args, len(trainer.train_dataset)
    steps, pieces = args.steps_of(rows), args.gradient_accumulation_steps
    if trainer.upper is None:
        return [Work("training", 1, steps, steps * pieces)]
    upper, rest = divmod(steps, args.lower_steps)
    works = [Work("search", 1, steps, (upper * passes_of_a_cycle(trainer) + rest) * pieces)]
    if trainer.has_second_phase:
        again = args.for_retraining()
        rows += len(trainer.upper_dataset)
        with suppress(AttributeError):  # of what `finish` learns
            rows = len(trainer.all_rows())
        steps = again.steps_of(rows)
        works.append(Work("retraining", 1, steps, steps * again.gradient_accumulation_steps))
    return works


def whole(trainer: BilevelTrainer) -> Work:
    """All phases of a run of ``trainer`` as one training."""
    each = phases(trainer)
    return Work("training", 1, sum(x.steps for x in each), sum(x.batches for x in each))


def levels(setup: Setup, trainer: BilevelTrainer) -> str:
    """Parameters, examples and steps in lines; a search without an upper step is a ProblemError."""
    args, works, rows = trainer.args, phases(trainer), len(trainer.train_dataset)
    lines, trained = [f"method: {trainer.method}"], {"trained": trainer.lower.variables}
    counts = {"training": rows}
    if trainer.upper is not None:
        trainer.require_upper_step(works[0].steps)
        trained = {"upper level": trainer.upper.variables, "lower level": trainer.lower.variables}
        counts = {"lower level": rows, "upper level": len(trainer.upper_dataset)}
        counts["retraining"] = sum(counts.values()) if works[1:] else 0
        updates = works[0].steps // args.lower_steps
        lines.append(f"estimator: {args.hypergradient}, for {updates} updates")
    counts["evaluation"] = len(setup.evaluation or ())
    sizes = [f"{sum(x.numel() for x in xs):,} {name}" for name, xs in trained.items()]
    lines.append(f"parameters: {', '.join(sizes)}")
    lines.append(f"examples: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    if setup.task.classes:
        lines.append(f"labels: {', '.join(setup.config.id2label.values())}")
    return "\n".join(lines)
