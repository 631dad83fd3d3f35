"""Betty's loop, over this library's levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.betty.configs import EngineConfig, Scripted
from hyperopt_peft.betty.problems import ImplicitProblem, Level
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.nested import Nested
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimate import check_ownership
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.registry import get_estimator

Edges = Mapping[ImplicitProblem, Iterable[ImplicitProblem]]


class Engine(Scripted):
    """Trains the problems of a script that was written for Betty.

    The problems form a chain by ``dependencies["l2u"]``. Hypergradients flow through the problems
    in ``dependencies["u2l"]`` and those between; without any, each problem follows its own gradient
    alone. A subclass may define ``validation``, which returns a mapping to print. A run of three or
    more problems ends after a whole step of the second.

    Raises:
        ProblemError: the problems form no chain, share a parameter, or have an unsupported part.
        NonFiniteError: a loss, a gradient or a curvature is NaN or infinite.

    Example:
        >>> from hyperopt_peft.betty import Config
        >>> class Outer(ImplicitProblem):
        ...     def training_step(self, batch):
        ...         return (self.inner(batch) - 1).square().mean()
        >>> class Inner(ImplicitProblem):
        ...     def training_step(self, batch):
        ...         return (self(batch) - self.outer(batch)).square().mean()
        >>> outer, inner = (
        ...     kind(name, Config("cg"), x := torch.nn.Linear(2, 1), torch.optim.SGD(x.parameters()),
        ...          train_data_loader=[torch.eye(2)])
        ...     for kind, name in ((Outer, "outer"), (Inner, "inner"))
        ... )
        >>> graph = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
        >>> Engine([outer, inner], EngineConfig(train_iters=300), graph).run()
        >>> outer.count
        300
    """

    def __init__(
        self,
        problems: Sequence[ImplicitProblem],
        config: EngineConfig | None = None,
        dependencies: Mapping[str, Edges] | None = None,
        env: None = None,
    ) -> None:
        if env is not None:
            raise ProblemError("env: is not supported; give the batches as train_data_loader")
        self.problems, self.config = problems, config or EngineConfig()
        self.dependencies, self._scores = dependencies or {"l2u": {}, "u2l": {}}, list[float]()
        gpu = self.config.strategy == "gpu" or torch.cuda.is_available()
        self.device = "cuda" if gpu and self.config.strategy != "cpu" else "cpu"
        for problem in problems:
            for other in (self, *problems):
                if not isinstance(getattr(other, problem.name, problem), ImplicitProblem | str):
                    raise ProblemError(f"{problem.name}: is an attribute; choose another name")
                if other is not problem:
                    setattr(other, problem.name, problem)
        self._levels = [Level(problem, self) for problem in self._chain()]
        lower: Problem = self._levels[-1]
        self._joint = [lower]  # each level with those below it
        for level, below in zip(self._levels[-2:0:-1], self._levels[:1:-1], strict=True):
            warmup = below.owner.config.warmup_steps // below.cycle * below.cycle
            counts = {"lower_steps": below.cycle, "warmup_steps": warmup}
            lower = Nested(level, lower, self._estimator(below, lower), **counts)
            self._joint.append(lower)
        if len(problems) > 1:
            check_ownership(self._levels[0], lower)
            estimator, seed = self._estimator(self._levels[1], lower), torch.initial_seed()
            self._bilevel = BilevelStep(self._levels[0], lower, estimator, seed=seed)

    @property
    def global_step(self) -> int:
        """The number of steps of the lowest problem."""
        return self._levels[-1].owner.count

    def _chain(self) -> list[ImplicitProblem]:
        """The problems from the highest to the lowest."""
        above, order = self.dependencies["l2u"], list[ImplicitProblem]()
        for problem in self.problems:
            problem.parents = list(above.get(problem, ()))
            problem.children = [x for x in self.problems if problem in above.get(x, ())]
        while rest := [x for x in self.problems if x not in order]:
            below = [x for x in rest if {*order[-1:]} <= {*x.parents} <= {*order}]
            if len(below) != 1 or (not order and below[0] in self._through()):
                raise ProblemError(
                    f"dependencies: {', '.join(x.name for x in rest)} are in no chain; put problems"
                    " that are side by side into one, with a module of both"
                )
            order += below
        return order

    def _through(self) -> set[ImplicitProblem]:
        """The problems in ``"u2l"``, through which hypergradients flow."""
        return {x for below in self.dependencies["u2l"].values() for x in below}

    def _estimator(self, level: Level, joint: Problem) -> Estimator:
        """The estimator of hypergradients through ``level``, with those below it ``joint``."""
        if self._through() & {x.owner for x in self._levels[self._levels.index(level) :]}:
            return level.owner.config.estimator(joint)
        return get_estimator("direct")

    def run(self) -> None:
        """Do ``train_iters`` steps of the lowest problem, and those above that follow."""
        for problem in self.problems:
            problem.train()
        stride, every = prod(x.cycle for x in self._levels[2:]), self.config.valid_step
        while self.config.train_iters - (before := self.global_step) >= stride:
            self.train_step()
            due = self.global_step // every > before // every
            if due and hasattr(self, "validation") and self._validate():
                break

    def train_step(self) -> None:
        """A step of the lowest problem (of the second if there are more) and those that follow."""
        if len(self._levels) == 1:
            (level,) = self._levels
            level.step(level.gradient(level.next_batch(), level.variables).gradient)
            return
        self._bilevel.train_lower()
        if self._levels[1].due:
            top, batch = self._levels[0], self._levels[0].next_batch()
            above = self._bilevel.hypergradient(batch, number=top.owner.count)
            top.step(above.hypergradient, above.grad_norm)
            if self.config.roll_back:
                for level, joint in zip(self._levels[:0:-1], self._joint, strict=True):
                    level.roll_back(joint)
            self._bilevel.forget()

    def report(self, numbers: Mapping[str, Any], *heads: str) -> None:
        """Print ``numbers`` and the present step."""
        values = [x.item() if isinstance(x, Tensor) else x for x in numbers.values()]
        shown = " || ".join(f"{name}: {x}" for name, x in zip(numbers, values, strict=True))
        print(*(f"[{x}]" for x in (*heads, f"Global Step {self.global_step}")), shown, flush=True)

    def _validate(self) -> bool:
        """Report a validation; returns whether to stop."""
        for problem in self.problems:
            problem.eval()
        numbers = self.validation() or {}
        self.report(numbers, "Validation")
        for problem in self.problems:
            problem.train()
        config, metric = self.config, self.config.early_stopping_metric
        if not config.early_stopping:
            return False
        if metric not in numbers:
            raise ProblemError(f"early_stopping_metric: validation returned no {metric!r}")
        scores, sign = self._scores, 1 if config.early_stopping_mode == "min" else -1
        scores.append(sign * float(numbers[metric]))
        return len(scores) - scores.index(min(scores)) > config.early_stopping_tolerance
