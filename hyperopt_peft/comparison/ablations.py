"""The ablation without a second level: all variables train together."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hyperopt_peft.core.problem import Problem, TaskLoss
from hyperopt_peft.trainer.method import Method


class OneLevel(Method):
    """The variables of both levels of ``method`` in one level, on all rows."""

    def __init__(self, method: Method) -> None:
        self.method, self.tags, self.own_loss = method, method.tags, method.own_loss
        self.defaults = {k: v for k, v in method.defaults.items() if k != "hypergradient"}
        names = "adapter", "rows", "all_rows", "prepare", "after_upper_step", "finish", "export"
        for name in names:
            setattr(self, name, getattr(method, name))

    def read_rows(self, model: Any, rows: Any, collate: Any) -> None:
        """As ``method``'s; a method of the class, where the trainer looks for an override."""
        self.method.read_rows(model, rows, collate)

    def lower(self, model: Any, task_loss: TaskLoss) -> Problem:
        """The lower level's loss over the variables of both levels."""
        vars(self.method)["row_losses"] = self.row_losses
        return _Together(self.method.lower(model, task_loss), self.method.upper(model, task_loss))


class _Together(Problem):
    def __init__(self, lower: Problem, upper: Problem) -> None:
        self.lower = lower
        pairs = [(n, x) for each in (lower, upper) for n, x in zip(each.names, each.variables)]
        super().__init__(pairs, name=f"{lower.name} in one level")
        if (prior := lower.prior) is not None:
            self.prior = lambda variables: prior(variables[: len(lower.variables)])

    def loss(self, batch: Any) -> Any:
        return self.lower.loss(batch)


class Projects(TrainerCallback):
    """Calls a method's ``after_upper_step`` after each step, since every step moves u."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_step_end(self, args: object, state: object, control: object, **_: Any) -> None:
        """Project."""
        self.method.project()
