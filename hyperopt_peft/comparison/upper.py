"""The upper level of a run: its arguments, and what it did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.trainer.logs import StepLog
from hyperopt_peft.trainer.method import Method, has_upper_level

#: The arguments of a method that names no estimator. An upper step after each lower one leaves too
#: few lower steps at equal price. Whichever variables F and f read, ``darts`` has both terms, and
#: no cheaper estimator does without second derivatives.
OPEN: dict[str, Any] = {"lower_steps": 4, "hypergradient": "darts"}
#: The numbers of upper steps whose means a line has.
NUMBERS = ("implicit_ratio", "residual")


def arguments_of(method: Method, args: Any) -> Any:
    """The user's ``args`` with the defaults of ``method``, or those of `OPEN`."""
    is_open = has_upper_level(method) and "hypergradient" not in method.defaults
    return args.with_defaults({**(OPEN if is_open else {}), **method.defaults})


def remedy(method: Method, args: Any) -> str:
    """What gives ``method`` more lower steps at equal price; nothing if it has many."""
    few = has_upper_level(method) and arguments_of(method, args).lower_steps < OPEN["lower_steps"]
    return f", or the method defaults = {OPEN}" if few else ""


def vector_of(level: Problem) -> Tensor:
    """A copy of the variables of ``level``, ``(n,)``, in float64."""
    return torch.cat([x.detach().to("cpu", torch.float64).flatten() for x in level.variables])


def summary(level: Problem, start: Tensor, rate: float, steps: int, log: StepLog) -> dict[str, Any]:
    """What the upper ``level`` did in ``steps`` from u0 = ``start`` at a peak ``rate``.

    ``start`` is ‖u0‖, ``moved`` is ‖u − u0‖ over it, or ‖u − u0‖ where it is 0, and
    ``moved_in_rates`` the mean |u − u0| over ``rate``, absent at a rate of 0. Means in ``log`` are
    over the steps that have the number, as ``implicit_ratio`` where F reads u, or absent.
    """
    change, norm = vector_of(level) - start, float(start.norm())
    found = {"steps": steps, "start": norm, "moved": float(change.norm()) / (norm or 1.0)}
    if rate:
        found["moved_in_rates"] = float(change.abs().mean()) / rate
    means, _ = log.read()
    return found | {name: means[name] for name in NUMBERS if name in means}


class UpperLevel(TrainerCallback):
    """Watches the search of ``trainer``; ``entries`` then has ``upper``, if there is a level."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.steps, self.entries = trainer, 0, dict[str, Any]()
        if trainer.upper is not None:
            self.start = vector_of(trainer.upper)
            trainer.add_callback(self)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count an upper step; one that was skipped has no gradients."""
        self.steps += any(u.grad is not None for u in self.trainer.upper.variables)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sum up, before the method changes its variables after the search."""
        rate, log = args.upper_learning_rate, self.trainer.current_step.log
        found = summary(self.trainer.upper, self.start, rate, self.steps, log)
        self.entries = {"upper": {name: getattr(args, name) for name in OPEN} | found}
