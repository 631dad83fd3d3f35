"""A budget of passes: a training ends when its passes are spent, and its rates follow them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import zeros
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.passes import PassCounter
from hyperopt_peft.utils.random_state import RandomState


class Budget(TrainerCallback):
    """Ends each phase of a training with its passes; the learning rates decay by passes.

    No cost is known before the training: a phase ends when no further step is within the budget, if
    the step takes as many passes as the dearest one of its kind so far. A search that a second
    phase follows ends at the upper step after which another cycle, and as many steps of the second
    phase as the search had, are not within it. A warm-up of n steps lasts n passes of the budget.

    Args:
        passes: of all phases.
        stop: the passes of the last phase after which the training ends before its budget.
        points: the passes after which the last phase is scored on the evaluation rows.

    Attributes:
        spent: the passes by use.
        cycles: for each phase, its steps and passes until its last upper step.
        curve: the point and the metrics of each evaluation.
        seconds, timed: the time of all steps but each phase's first one, which allocates, and the
            passes of these steps.

    Example:
        >>> Budget(300).spent["upper steps"]
        0.0
    """

    def __init__(
        self, passes: float, stop: float | None = None, points: Sequence[float] = ()
    ) -> None:
        self.passes, self.phase = passes, 0
        self.seconds = self.timed = 0.0
        self.stop = math.inf if stop is None else stop
        self.points = sorted(point for point in points if point < passes)
        self.curve: list[tuple[float, dict[str, float]]] = []
        self.reached: list[float] = []
        self.spent = dict.fromkeys(("lower steps", "upper steps", "second training"), 0.0)

    def __copy__(self) -> Self:
        """Itself: the second phase's copies of the callbacks have one budget."""
        return self

    def begin(self, trainer: Any, unit: int) -> None:
        """Count the passes of ``trainer``, which has this callback, in units of ``unit`` rows."""
        args = trainer.args
        self.again = bool(trainer.has_second_phase)
        self.counter: PassCounter = trainer.passes
        self.counter.unit = unit
        self.every = self.lower_steps = 0 if trainer.upper is None else args.lower_steps
        self.cycles = list[tuple[int, float]]()
        self.a_step: float = args.train_batch_size * args.gradient_accumulation_steps / unit

    def on_train_begin(
        self, args: Any, state: Any, control: object, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Begin a phase."""
        self.phase += 1
        if self.phase > 1:
            self.every, self.again = 0, False
        self.cycles.append((0, 0.0))
        self.start = self.last = self.upper = self.counter.passes
        self.state = state
        self.costs, self.cycle = {False: 0.0, True: 0.0}, 0.0
        self.clock: float | None = None
        if isinstance(lr_scheduler, LambdaLR):
            name, total = args.lr_scheduler_type, math.ceil(self.passes)
            steps = args.get_warmup_steps(total), total
            made = get_scheduler(name, SGD([zeros(1)]), *steps, args.lr_scheduler_kwargs)
            by_passes = lambda _: made.lr_lambdas[0](min(1.0, self.progress()) * total)  # noqa: E731
            lr_scheduler.lr_lambdas = [by_passes for _ in lr_scheduler.lr_lambdas]

    def reserved(self) -> float:
        """The passes of a second phase with as many steps as the search has now."""
        return self.again * int(self.state.global_step) * self.a_step

    def progress(self) -> float:
        """The share of the phase that is done."""
        spent = self.counter.passes - self.start
        return (spent + self.reserved()) / max(1e-9, self.passes - self.start)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the phase if the next step, or the next cycle of a search, is above the budget.

        Raises:
            ProblemError: the step sends no row through the model.
        """
        now, step = self.counter.passes, state.global_step
        if now == self.last:
            raise ProblemError(
                "passes: a step sends no row through the model itself, so that none can be "
                "counted; let the losses call the model"
            )
        if self.clock is not None:
            self.seconds += time.perf_counter() - self.clock
            self.timed += now - self.last
        is_upper = bool(self.every) and step % self.every == 0
        self.costs[is_upper] = max(self.costs[is_upper], now - self.last)
        if is_upper or not self.every:
            self.cycles[-1] = step, now - self.start
        self.last = now
        self.clock = time.perf_counter()
        if self.every > 1:  # a row may be several for the model, as DPO's pairs
            self.a_step = max(self.a_step, self.costs[False])
        name = "second training" if self.phase > 1 else "lower steps"
        self.spent[name] = step * self.a_step if self.every else now - self.start
        if self.every:
            self.spent["upper steps"] = now - self.start - self.spent[name]
        if self.again and not is_upper:
            return
        following = self.costs[bool(self.every) and (step + 1) % self.every == 0]
        if self.again:
            self.cycle = max(self.cycle, now - self.upper)
            self.upper = now
            following = self.cycle + self.every * self.a_step
        end = self.passes if self.again else min(self.passes, self.start + self.stop)
        if now + self.reserved() + following > end + 1e-6:
            control.should_training_stop = True
        while self.points and now + following > self.points[0] + 1e-6:
            point = self.points.pop(0)
            if not self.again:
                self.reached.append(point)
        if self.reached:
            control.should_evaluate = True
            self.random = RandomState.capture([args.device])

    def on_evaluate(
        self, args: object, state: object, control: object, metrics: dict[str, float], **_: Any
    ) -> None:
        """Keep the metrics at the points that are reached; the run goes on as without them."""
        if self.reached:
            self.random.restore()  # an evaluation's loader draws a number
        self.curve += [(point, dict(metrics)) for point in self.reached]
        self.reached = []
        self.clock = time.perf_counter()


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
