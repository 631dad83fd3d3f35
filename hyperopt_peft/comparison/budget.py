"""A budget of passes: a training ends when its passes are spent, and its rates follow them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import zeros
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.passes import PassCounter, passes_of_a_cycle


@dataclass
class Spending:
    """What a training has spent; the copies of its `Budget` in the two phases share it.

    Attributes:
        passes: the budget.
        counter: counts the passes.
        every: the lower steps from one upper step to the next; 0 without an upper level.
        again: whether a second phase follows.
        a_step: the passes of a lower step.
        phase: the number of the phase, from 1.
        by_use: the passes by use.
        seconds, timed: the time of all steps but each phase's first one, which allocates, and the
            passes of these steps.
    """

    passes: float
    counter: PassCounter = field(default_factory=PassCounter)
    every: int = 0
    again: bool = False
    a_step: float = 1.0
    phase: int = 0
    by_use: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    timed: float = 0.0


class Budget(TrainerCallback):
    """Ends each phase of a training with its passes; the learning rates decay by passes.

    No cost is known before the training: a phase ends when no further step is within the budget, if
    the step takes as many passes as the dearest one of its kind so far. A search that a second
    phase follows ends at the upper step after which another cycle, and as many steps of the second
    phase as the search had, are not within it. A warm-up of n steps lasts n passes of the budget.

    Args:
        passes: the budget of all phases.

    Example:
        >>> budget = Budget(300)
        >>> budget.spending.passes
        300
    """

    def __init__(self, passes: float) -> None:
        self.spending = Spending(passes)

    def begin(self, trainer: Any, unit: int) -> None:
        """Count the passes of ``trainer``, which has this callback, in units of ``unit`` rows."""
        spending, args = self.spending, trainer.args
        spending.counter, spending.again = trainer.passes, trainer.has_second_phase
        spending.counter.unit = unit
        spending.every = 0 if trainer.upper is None else args.lower_steps
        spending.a_step = args.train_batch_size * args.gradient_accumulation_steps / unit

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Begin a phase."""
        self.spending.phase += 1
        self.is_search = self.spending.again and self.spending.phase == 1
        self.every = self.spending.every if self.spending.phase == 1 else 0
        self.start = self.last = self.upper = self.spending.counter.passes
        self.costs, self.cycle, self.state = dict[bool, float](), 0.0, state
        self.clock: float | None = None
        if isinstance(lr_scheduler, LambdaLR):
            steps = math.ceil(self.spending.passes)
            (rule,) = get_scheduler(
                args.lr_scheduler_type,
                SGD([zeros(1)]),
                args.get_warmup_steps(steps),
                steps,
                args.lr_scheduler_kwargs,
            ).lr_lambdas
            by_passes = lambda _: rule(min(1.0, self.progress) * steps)  # noqa: E731
            lr_scheduler.lr_lambdas = [by_passes for _ in lr_scheduler.lr_lambdas]

    @property
    def reserved(self) -> float:
        """The passes of a second phase with as many steps as the search has now."""
        return self.state.global_step * self.spending.a_step if self.is_search else 0.0

    @property
    def progress(self) -> float:
        """The share of the phase that is done."""
        spent = self.spending.counter.passes - self.start
        return (spent + self.reserved) / max(1e-9, self.spending.passes - self.start)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the phase if the next step, or the next cycle of a search, is above the budget.

        Raises:
            ProblemError: the step sends no row through the model.
        """
        spending, now, step = self.spending, self.spending.counter.passes, state.global_step
        if now == self.last:
            raise ProblemError(
                "passes: a step sends no row through the model itself, so that none can be "
                "counted; let the losses call the model"
            )
        if self.clock is not None:
            spending.seconds += time.perf_counter() - self.clock
            spending.timed += now - self.last
        is_upper = bool(self.every) and step % self.every == 0
        self.costs[is_upper] = max(self.costs.get(is_upper, 0.0), now - self.last)
        self.last, self.clock = now, time.perf_counter()
        if self.every > 1 and not is_upper:  # a row may be several for the model, as DPO's pairs
            spending.a_step = max(spending.a_step, self.costs[False])
        name = "second training" if spending.phase > 1 else "lower steps"
        spending.by_use[name] = step * spending.a_step if self.every else now - self.start
        if self.every:
            spending.by_use["upper steps"] = now - self.start - spending.by_use[name]
        if self.is_search and not is_upper:
            return
        following = self.costs.get(bool(self.every) and (step + 1) % self.every == 0, 0.0)
        if self.is_search:
            self.cycle, self.upper = max(self.cycle, now - self.upper), now
            following = self.cycle + self.every * spending.a_step
        control.should_training_stop |= now + self.reserved + following > spending.passes + 1e-6


def predicted_steps(trainer: Any, passes: float, unit: int) -> list[int]:
    """About how many steps each phase of ``trainer`` has with ``passes`` of ``unit`` rows."""
    args, every = trainer.args, 1 if trainer.upper is None else trainer.args.lower_steps
    rows = args.train_batch_size * args.gradient_accumulation_steps
    again = every if trainer.has_second_phase else 0
    steps = int(passes * unit // (rows * (passes_of_a_cycle(trainer) + again))) * every
    return [steps, steps] if again else [steps]


def peak_memory() -> Callable[[], float]:
    """A function that returns the peak memory since now in MB: the device's, or the process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 1e6
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

    def peak() -> float:
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1e3
        return float("nan")

    return peak
