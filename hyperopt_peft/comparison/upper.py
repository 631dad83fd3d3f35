"""The upper level of a run: its arguments, and what it did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hyperopt_peft.core.labels import RowLosses
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.trainer.logs import StepLog
from hyperopt_peft.trainer.method import Method, defaults_of, has_upper_level

#: The arguments of a method that names no estimator: an upper step after each lower one leaves too
#: few of these at equal price, and ``darts`` has both terms without second derivatives.
OPEN: dict[str, Any] = {"lower_steps": 4, "hypergradient": "darts"}


def arguments_of(method: Method, args: Any, rule: RowLosses | None = None) -> Any:
    """The user's ``args`` with the defaults of ``method``, or those of `OPEN`."""
    is_open = has_upper_level(method) and "hypergradient" not in method.defaults
    return args.with_defaults({**(OPEN if is_open else {}), **defaults_of(method, rule)})


def vector_of(level: Problem) -> Tensor:
    """A copy of the variables of ``level``, ``(n,)``, in float64."""
    return torch.cat([x.detach().to("cpu", torch.float64).flatten() for x in level.variables])


def summary(level: Problem, start: Tensor, rate: float, steps: int, log: StepLog) -> dict[str, Any]:
    """What the upper ``level`` did in ``steps`` from u0 = ``start`` at a peak ``rate``.

    ``start`` is ‖u0‖; ``moved`` is ‖u − u0‖ over it, and ‖u − u0‖ where it is 0; ``moved_in_rates``
    is the mean ``|u − u0|`` over ``rate``, absent at 0. The others are means over the steps with
    the number, absent where none has, such as the ratio where F does not read u.
    """
    change, norm, (means, _) = vector_of(level) - start, float(start.norm()), log.read()
    found = {"steps": steps, "start": norm, "moved": float(change.norm()) / (norm or 1.0)}
    if rate:
        found["moved_in_rates"] = float(change.abs().mean()) / rate
    return found | {x: means[x] for x in ("implicit_ratio", "residual") if x in means}


class UpperLevel(TrainerCallback):
    """Watches the search of ``trainer``; ``entries`` then has ``upper``, if there is a level."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.entries: dict[str, Any] = {}
        if trainer.upper is not None:
            self.start = vector_of(trainer.upper)
            trainer.add_callback(self)

    def on_train_end(self, args: Any, state: object, control: object, **_: Any) -> None:
        """Sum up, before the method changes its variables after the search."""
        step, rate = self.trainer.current_step, args.upper_learning_rate
        found = summary(self.trainer.upper, self.start, rate, step.bilevel.count, step.log)
        self.entries = {"upper": {name: getattr(args, name) for name in OPEN} | found}
