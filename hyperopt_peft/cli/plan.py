"""``--dry_run``: what a command would train, on how many rows and steps, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any

from torch import Tensor

from hyperopt_peft.adapters import split_parameters
from hyperopt_peft.cli.text.setup import Setup
from hyperopt_peft.problems import BiDoRATrainer
from hyperopt_peft.trainer.arguments import BilevelTrainingArguments
from hyperopt_peft.utils.models import base_model

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
                        trainings   steps  passes  minutes
        lora                    3     100     100      2.5
        bidora                  3     200     300      7.5
        together about 10.0 minutes without evaluation, by a timed pass of 0.50 seconds
    """
    lines = [f"{'':16}{'trainings':>9}{'steps':>8}{'passes':>8}{'minutes':>9}"]
    minutes = [work.trainings * work.passes * seconds / 60 for work in works]
    for work, each in zip(works, minutes, strict=True):
        lines.append(f"{work.name:16}{work.trainings:9}{work.steps:8}{work.passes:8.0f}{each:9.1f}")
    lines.append(
        f"together about {sum(minutes):.1f} minutes without evaluation, by a timed pass of "
        f"{seconds:.2f} seconds"
    )
    return "\n".join(lines)


def seconds_a_pass(trainer: Any) -> float:
    """The mean time of a micro-batch forward and backward; gradients are None again afterwards."""
    model = trainer.model.to(trainer.args.device)
    names = signature(base_model(model).forward).parameters
    begin = 0.0
    for number, batch in enumerate(islice(_repeated(trainer), TIMED + 1)):
        inputs = {k: v.to(trainer.args.device) for k, v in batch.items() if k in names}
        with trainer.compute_loss_context_manager():
            loss = model(**inputs).loss
        loss.backward()
        float(loss.detach())  # waits for the device
        if number == 0:  # which allocates, and may compile
            begin = time.perf_counter()
    model.zero_grad()
    return (time.perf_counter() - begin) / TIMED


def _repeated(trainer: Any) -> Iterable[Any]:
    while True:
        yield from trainer.get_train_dataloader()


def passes_of_steps(trainer: Any, steps: int) -> int:
    """The passes of ``steps`` optimizer steps, the upper level's included."""
    args = trainer.args
    if not isinstance(trainer, BiDoRATrainer):
        return int(steps * args.gradient_accumulation_steps)
    upper, rest = divmod(steps, args.lower_steps)
    passes = upper * trainer.passes_of_an_upper_step()
    return int(passes + rest * args.gradient_accumulation_steps)


def phases(setup: Setup, trainer: Any) -> list[Work]:
    """The trainings of one run of ``trainer``."""
    args, lower = trainer.args, len(trainer.train_dataset)
    if not isinstance(trainer, BiDoRATrainer):
        steps = BilevelTrainingArguments.steps_of(args, lower)  # TRL's arguments have none
        return [Work("training", 1, steps, passes_of_steps(trainer, steps))]
    search, again = args.phases(lower, len(setup.train))
    works = [Work("search", 1, search, passes_of_steps(trainer, search))]
    if again:
        accumulation = args.for_retraining().gradient_accumulation_steps
        works.append(Work("retraining", 1, again, again * accumulation))
    return works


def levels(setup: Setup, trainer: Any) -> str:
    """Parameters, examples, steps and classes in lines; no upper step is a ProblemError."""
    args, model = trainer.args, trainer.model
    everything, lower = len(setup.train), len(trainer.train_dataset)
    evaluation = 0 if setup.evaluation is None else len(setup.evaluation)
    lines = [f"method: {args.method}"]
    if trainer.upper is None:
        lines += [
            f"one level, all of the adapter: {_count(trainer.lower.variables)}",
            f"examples: {lower} training, {evaluation} evaluation",
            f"steps: {args.steps_of(lower)}",
        ]
    else:
        owners = split_parameters(model)
        search, again = args.phases(lower, everything)
        trainer.require_upper_step(search)
        args.warn_of_short_phases(search, again)
        lines += [
            f"upper level, magnitudes: {_count(owners.magnitudes.values())}",
            f"lower level, directions: {_count(owners.directions.values())}",
            f"lower level, head: {_count(owners.rest.values())}",
            f"examples: {lower} lower level, {len(trainer.upper_dataset)} upper level, "
            f"{everything if again else 0} retraining, {evaluation} evaluation",
            f"steps: {search} lower in the search, {search // args.lower_steps} upper, "
            f"{again} in the retraining",
            f"estimator: {args.hypergradient}",
        ]
    lines.append(f"frozen: {_count(p for p in model.parameters() if not p.requires_grad)}")
    if setup.task.classes:
        lines.append(f"labels: {', '.join(setup.config.id2label.values())}")
    return "\n".join(lines)


def _count(parameters: Iterable[Tensor]) -> str:
    sizes = [parameter.numel() for parameter in parameters]
    return f"{sum(sizes):,} parameters in {len(sizes)} tensors"
