"""The price of a run: passes (forward and backward over a batch), seconds and memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hyperopt_peft.errors import ProblemError


def rows_of(steps: int, rows: int, batch: int) -> int:
    """The rows that ``steps`` steps read of ``rows`` rows; an epoch's last batch may be smaller.

    Example:
        >>> [rows_of(steps, 10, 4) for steps in (2, 3, 4)]
        [8, 10, 14]
    """
    epochs, rest = divmod(steps, -(-rows // batch))
    return epochs * rows + min(rest * batch, rows)


def most(allowed: float, rows: Callable[[int], float]) -> int:
    """The largest number n with ``rows(n)`` of at most ``allowed``; rows(n) ≥ n rise with n.

    Example:
        >>> [most(allowed, lambda steps: rows_of(steps, 10, 4)) for allowed in (7, 8, 10, 14)]
        [1, 2, 3, 4]
    """
    return bisect_right(range(1, int(max(0, allowed)) + 1), allowed, key=rows)


@dataclass(frozen=True)
class Price:
    """The price of the steps of a method.

    Attributes:
        unit: the number of rows in a pass, the same for all methods.
        batch: the number of rows in a lower step.
        lower, everything: the number of training rows in the first and in the second phase.
        every: the lower steps from one upper step to the next; 0 without an upper level.
        upper: the rows that an upper step sends through the model, without its lower step.
        again: whether a second training follows.
        start, a_pass: the seconds before the first step, and those of a pass.
    """

    unit: int
    batch: int
    lower: int
    everything: int
    every: int = 0
    upper: float = 0.0
    again: bool = False
    start: float = 0.0
    a_pass: float = 0.0

    def spent(self, steps: Sequence[int]) -> dict[str, float]:
        """The passes of lower steps, upper steps and the second training."""
        return {name: rows / self.unit for name, rows in self._rows(*steps).items()}

    def _rows(self, search: int, again: int = 0) -> dict[str, float]:
        return {
            "lower steps": rows_of(search, self.lower, self.batch),
            "upper steps": search // self.every * self.upper if self.every else 0,
            "second training": rows_of(again, self.everything, self.batch),
        }

    def of_run(self, steps: Sequence[int], passes: float) -> Price:
        """This price with the mean cost of an upper step in a run that took ``passes``.

        Example:
            >>> Price(10, 10, lower=80, everything=100, every=2, upper=20).of_run([40], 80).upper
            20.0
        """
        rows = self._rows(*steps) | {"upper steps": 0}
        upper = (passes * self.unit - sum(rows.values())) / max(1, steps[0] // (self.every or 1))
        return replace(self, upper=upper)

    def steps(self, passes: float) -> list[int]:
        """The steps of each phase of a run of ``passes`` passes.

        Both phases have about the same number, and ``passes`` leave no room for one more step. The
        search ends with an upper step; without a second phase it ends with lower steps.

        Example:
            >>> Price(10, 10, lower=80, everything=100, every=4, upper=20, again=True).steps(300)
            [120, 120]
        """
        allowed, every = passes * self.unit, self.every

        def rows(search: int, again: int = 0) -> float:
            return sum(self._rows(search, again).values())

        if not self.again:
            return [max(every, most(allowed, rows))]
        search = max(1, most(allowed, lambda n: rows(n * every, n * every))) * every
        return [search, most(allowed, lambda n: rows(search, n))]


def measured(trainer: Any, start: float, unit: int) -> Price:
    """The price of the steps of ``trainer``, measured on two upper steps or four lower ones.

    Args:
        trainer: not yet trained; this function trains it.
        start: the seconds of a run before its training.
        unit: the number of rows in a pass.

    Raises:
        ProblemError: the steps send no row through the model.
    """
    trainer.passes.unit = unit
    args, passes, again = trainer.args, trainer.passes, trainer.has_second_phase
    every = 0 if trainer.upper is None else args.lower_steps
    args.max_steps, args.retrain = 2 * every or 4, "none"
    args.warmup_steps = 0  # an estimator may do nothing at a rate of 0
    args.logging_strategy, args.logging_steps = "steps", 1
    trainer.train()
    lower = everything = len(trainer.train_dataset)
    if again:  # on rows that may be packed
        everything = len(trainer.retraining(args).train_dataset)
    batch = args.train_batch_size * args.gradient_accumulation_steps
    if passes.joined:  # each batch counts as a whole one
        lower, everything = (-(-rows // batch) * batch for rows in (lower, everything))
    logs = trainer.state.log_history  # of the first step, which allocates, to the end
    begin, first, end, last = (logs[k][x] for k in (0, -2) for x in ("seconds", "passes"))
    if last == first:
        raise ProblemError(
            "passes: a step sends no row through the model itself, so that none can be counted; "
            "let the losses call the model"
        )
    if every != 1:  # a row may be several for the model, as the pairs of DPO
        copies = max(1, round(first * unit / min(batch, lower)))
        batch, lower, everything = batch * copies, lower * copies, everything * copies
    upper = (passes.passes * unit - rows_of(2 * every, lower, batch)) / 2 if every else 0.0
    a_pass = (end - begin) / (last - first)
    return Price(unit, batch, lower, everything, every, upper, again, start, a_pass)


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
