"""``--dry_run``: what a command would train, on how many rows and steps, and for how long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import cycle, islice
from typing import Any

from hyperopt_peft.cli.text.setup import Setup
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.utils.models import base_model
from hyperopt_peft.utils.tables import aligned

#: Micro-batches that are timed, after a first one.
TIMED = 2


@dataclass(frozen=True)
class Work:
    """Trainings of one kind.

    Attributes:
        name: of the method or the phase.
        trainings: their number.
        steps: the optimizer steps of one.
        passes: the micro-batches that one sends forward and backward.
    """

    name: str
    trainings: int
    steps: int
    passes: float


def table(works: Sequence[Work], seconds: float) -> str:
    """``works`` and their time, where a pass takes ``seconds``.

    Example:
        >>> print(table([Work("lora", 3, 100, 100), Work("bidora", 3, 200, 300)], 0.5))
                trainings  steps  passes  minutes
        lora            3    100     100      2.5
        bidora          3    200     300      7.5
        together about 10.0 minutes without evaluation, by a timed pass of 0.50 seconds
    """
    minutes = [work.trainings * work.passes * seconds / 60 for work in works]
    rows: list[Sequence[Any]] = [("", "trainings", "steps", "passes", "minutes")]
    for work, each in zip(works, minutes, strict=True):
        rows.append((work.name, work.trainings, work.steps, f"{work.passes:.0f}", f"{each:.1f}"))
    return (
        f"{aligned(rows)}\ntogether about {sum(minutes):.1f} minutes without evaluation, by a "
        f"timed pass of {seconds:.2f} seconds"
    )


def in_words(seconds: float) -> str:
    """A time to read.

    Example:
        >>> in_words(95), in_words(300)
        ('95 seconds', '5 minutes')
    """
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def seconds_a_pass(trainer: Any) -> float:
    """The mean time of a micro-batch forward and backward; gradients are None again afterwards."""
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


def passes_of_steps(trainer: Any, steps: int) -> int:
    """The passes of ``steps`` optimizer steps, the upper level's included."""
    args = trainer.args
    if getattr(trainer, "upper", None) is None:
        return int(steps * args.gradient_accumulation_steps)
    upper, rest = divmod(steps, args.lower_steps)
    passes = upper * trainer.passes_of_an_upper_step()
    return int(passes + rest * args.gradient_accumulation_steps)


def phases(setup: Setup, trainer: Any) -> list[Work]:
    """The trainings of one run of ``trainer``."""
    args, lower = trainer.args, len(trainer.train_dataset)
    if getattr(trainer, "upper", None) is None:
        steps = BilevelTrainingArguments.steps_of(args, lower)  # TRL's arguments have none
        return [Work("training", 1, steps, passes_of_steps(trainer, steps))]
    search, again = args.phases(lower, len(setup.train))
    works = [Work("search", 1, search, passes_of_steps(trainer, search))]
    if again:
        accumulation = args.for_retraining().gradient_accumulation_steps
        works.append(Work("retraining", 1, again, again * accumulation))
    return works


def whole(setup: Setup, trainer: Any, name: str, trainings: int = 1) -> Work:
    """All phases of a run of ``trainer`` as one training."""
    each = phases(setup, trainer)
    return Work(name, trainings, sum(x.steps for x in each), sum(x.passes for x in each))


def levels(setup: Setup, trainer: Any) -> str:
    """Parameters, examples and steps in lines; a search without an upper step is a ProblemError."""
    args, rows = trainer.args, {"training": len(trainer.train_dataset)}
    lines, trained = [f"method: {args.method}"], {"trained": trainer.lower.variables}
    if trainer.upper is not None:
        search, again = args.phases(rows["training"], len(setup.train))
        trainer.require_upper_step(search)
        trained = {"upper level": trainer.upper.variables, "lower level": trainer.lower.variables}
        rows = {"lower level": rows["training"], "upper level": len(trainer.upper_dataset)}
        rows["retraining"] = len(setup.train) if again else 0
        lines.append(f"estimator: {args.hypergradient}, for {search // args.lower_steps} updates")
    rows["evaluation"] = 0 if setup.evaluation is None else len(setup.evaluation)
    sizes = [f"{sum(x.numel() for x in xs):,} {name}" for name, xs in trained.items()]
    lines.append(f"parameters: {', '.join(sizes)}")
    lines.append(f"examples: {', '.join(f'{count} {name}' for name, count in rows.items())}")
    if setup.task.classes:
        lines.append(f"labels: {', '.join(setup.config.id2label.values())}")
    return "\n".join(lines)
