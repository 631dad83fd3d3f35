"""Betty's problems and their loop, over this library's levels."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.betty.configs import Config, EngineConfig
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.engine.nested import Nested
from hyperopt_peft.engine.step import BilevelStep
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimate import check_ownership
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.utils.restore import assign_

PARTS = ("train_data_loader", "module", "optimizer", "scheduler")
#: Methods of Betty that are not called here.
NOT_CALLED = "get_batch|get_batch_single_loader|get_loss|meta_trainable_parameters|patch_[a-z_]+|"
NOT_CALLED += "param_groups|(custom_)?optimizer_step|one_step_descent|training_step_exec|step|"
NOT_CALLED += "backward|clip_grad|epoch_callback|configure_systems|parse_dependency|do_validation"


class _Scripted:
    def __init_subclass__(cls) -> None:
        for method in (name for name in vars(cls) if re.fullmatch(NOT_CALLED, name)):
            raise ProblemError(
                f"{cls.__name__}: {method} is not called; give batches as train_data_loader, groups"
                " to the optimizer, and use training_step, forward and the callbacks"
            )

    def is_rank_zero(self) -> bool:
        """True, since there is one process."""
        return True


@dataclass(eq=False, repr=False)
class ImplicitProblem(_Scripted):
    """One level, whose loss a subclass defines as ``training_step(batch)``.

    The loss is a scalar, or ``"loss"`` of a mapping with numbers to print. A subclass may have
    ``on_inner_loop_start``, ``grad_callback`` and ``param_callback`` (before and after a step), and
    ``configure_module`` and the like for parts that are not given. The level owns those of
    ``trainable_parameters()`` that the optimizer holds and that require a gradient.

    Example:
        >>> class Fit(ImplicitProblem):
        ...     def training_step(self, batch):
        ...         return (self(batch) - 1).square().mean()
        >>> module = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> fit = Fit("fit", Config(), module, optimizer, train_data_loader=[torch.eye(2)])
        >>> Engine([fit], EngineConfig(train_iters=100)).run()
        >>> fit.training_step(torch.eye(2)).item() < 1e-3
        True
    """

    name: str
    config: Any = None
    module: Any = None
    optimizer: Any = None
    scheduler: Any = None
    train_data_loader: Any = None
    extra_config: Any = None
    device: Any = None
    count, _loaders = 0, None
    on_inner_loop_start = grad_callback = param_callback = lambda self: None
    cfg = property(lambda self: self.extra_config)
    leaf = property(lambda self: not self.children)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        return self.module(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    def trainable_parameters(self) -> list[Tensor]:
        """All parameters of the module; a subclass may name fewer."""
        return list(self.module.parameters())

    def state_dict(self) -> dict[str, Any]:
        """The states of the module, the optimizer and, if there is one, the scheduler."""
        return {x: getattr(self, x).state_dict() for x in PARTS[1:] if getattr(self, x) is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`."""
        for part, state in state_dict.items():
            getattr(self, part).load_state_dict(state)


class _Level(Problem):
    def __init__(self, owner: Any, engine: Engine) -> None:
        self.owner, self.engine, self.config = owner, engine, owner.config
        for part in PARTS:
            if getattr(owner, part) is None and hasattr(owner, f"configure_{part}"):
                setattr(owner, part, getattr(owner, f"configure_{part}")())
            if part != "scheduler" and isinstance(getattr(owner, part), tuple | None):
                raise ProblemError(f"{owner.name}: give one {part}, or define configure_{part}")
            if owner.train_data_loader is not owner._loaders:  # in Betty a list, from here on
                owner.train_data_loader = owner._loaders = [owner.train_data_loader]
        for method in ("parameters", "train", "eval"):
            vars(owner).setdefault(method, getattr(owner, method, getattr(owner.module, method)))
        owner.device = owner.device or engine.device
        owner.module.to(owner.device)
        trained = {id(x) for x in owner.trainable_parameters() if x.requires_grad}
        for group in owner.optimizer.param_groups:
            group["params"] = [x for x in group["params"] if id(x) in trained]
        held = {id(x) for group in owner.optimizer.param_groups for x in group["params"]}
        super().__init__(
            [(name, x) for name, x in owner.module.named_parameters() if id(x) in held],
            data=owner.train_data_loader[0],
            optimizer=owner.optimizer,
            max_grad_norm=self.config.gradient_clipping or None,
            name=owner.name,
        )
        self.moving = (*self.variables, *owner.module.buffers())
        self.rolls = engine.config.roll_back and bool(owner.parents)
        self.parts = self.config.gradient_accumulation
        self.cycle = self.config.unroll_steps * self.parts  # batches for a step of the level above
        self.warmup = self.config.warmup_steps // self.cycle * self.cycle
        self.recent, self.pending, self.logged = deque[Any]([], self.parts), 0, 0

    @property
    def due(self) -> bool:  # whether the level above takes a step
        return self.owner.count % self.cycle == 0 and bool(self.owner.count > self.warmup)

    def loss(self, batch: Any) -> Any:
        half, device = self.config.precision == "bf16", self.variables[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return self.owner.training_step(batch)

    def next_batch(self) -> Any:
        if self.owner.count == 0 or self.due:
            self.owner.on_inner_loop_start()
        if self.rolls and self.owner.count % self.cycle == 0:
            values = [x.detach().clone() for x in self.moving]
            self.start = values, deepcopy(self.owner.optimizer.state_dict())
        self.owner.count += 1
        self.owner.cur_batch = super().next_batch()
        self.recent.append(self.owner.cur_batch)
        return self.owner.cur_batch

    def differentiate(
        self, batch: object, variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        loss, metrics, gradient = super().differentiate(batch, variables)
        self.stats, own = {"loss": loss, **metrics}, set(map(id, self.variables))
        pairs = list(zip(variables, gradient, strict=True))
        self.unread = {id(x) for x, g in pairs if g is None and id(x) in own}
        if self.config.allow_unused:  # where None would be an error
            gradient = tuple(torch.zeros_like(x) if id(x) in self.unread else g for x, g in pairs)
        return loss, metrics, gradient

    def step(self, gradient: Sequence[Tensor | None], norm: float | None = None) -> float:
        skipped = set() if self.owner.children else self.unread
        for x, g in zip(self.variables, gradient, strict=True):
            if g is not None and id(x) not in skipped:
                g = g.to(x.dtype) / self.parts
                x.grad = g if x.grad is None else x.grad + g
        self.owner.grad_callback()
        self.pending = (self.pending + 1) % self.parts
        if self.pending == 0:
            norm = super().step([x.grad for x in self.variables])
            self.owner.param_callback()
        if self.owner.scheduler is not None and not self.rolls:
            self.owner.scheduler.step()
        count, every = self.owner.count, self.config.log_step
        if every > 0 and count % every == 0 and count > self.logged:  # not again by `repeat`
            self.logged = count
            self.engine._report(self.stats, f"Problem {self.name}", f"Local Step {count}")
        return norm or 0.0

    def repeat(self, joint: Problem) -> None:
        # As DARTS: the last step again, from the start of the loop and with the new u.
        assign_(self.moving, self.start[0])
        self.owner.optimizer.load_state_dict(self.start[1])
        for batch in self.recent:
            self.step(joint.gradient(batch, joint.variables).gradient)
        if self.owner.scheduler is not None:
            self.owner.scheduler.step()


@dataclass(eq=False, repr=False)
class Engine(_Scripted):
    """Trains ``problems`` that form a chain by ``dependencies["l2u"]``.

    Hypergradients flow through the problems in ``dependencies["u2l"]`` and those between; without
    any, each problem follows its own gradient. A subclass may have ``validation``, which returns a
    mapping to print. A run of three or more problems ends after a whole step of the second. The
    example is that of `ImplicitProblem`.

    Raises:
        ProblemError: the problems form no chain, share a parameter, or lack a part.
    """

    problems: Sequence[Any]
    config: Any = None
    dependencies: Mapping[str, Mapping[Any, Iterable[Any]]] | None = None
    env: Any = None

    def __post_init__(self) -> None:
        if self.env is not None:
            raise ProblemError("env: is not supported; give batches as train_data_loader")
        self.config, self._scores = self.config or EngineConfig(), list[float]()
        gpu = self.config.strategy == "gpu" or torch.cuda.is_available()
        self.device = "cuda" if gpu and self.config.strategy != "cpu" else "cpu"
        for x, other in ((x, y) for x in self.problems for y in (self, *self.problems) if x != y):
            if not isinstance(getattr(other, x.name, x), ImplicitProblem):
                raise ProblemError(f"{x.name}: is an attribute already; choose another name")
            setattr(other, x.name, x)
        edges = self.dependencies or {"l2u": {}, "u2l": {}}
        for x in self.problems:
            x.config, x.parents = x.config or Config(), list(edges["l2u"].get(x, ()))
            x.children = [y for y in self.problems if x in edges["l2u"].get(y, ())]
        through, chain = {x for below in edges["u2l"].values() for x in below}, list[Any]()
        while rest := [x for x in self.problems if x not in chain]:
            below = [x for x in rest if {*chain[-1:]} <= {*x.parents} <= {*chain}]
            if len(below) != 1 or (not chain and below[0] in through):
                names = ", ".join(x.name for x in rest)
                raise ProblemError(f"dependencies: {names} form no chain; join their modules")
            chain += below
        self._levels = [_Level(x, self) for x in chain]
        self._joint = list[Problem](self._levels[-1:])  # levels with those below, lowest first
        for i in range(len(chain) - 1, 0, -1):
            above, level, joint = self._levels[i - 1], self._levels[i], self._joint[-1]
            flows = through & {*chain[i:]}
            estimator = get_estimator(level.config.estimator(joint) if flows else "direct")
            if i > 1:
                counts = {"lower_steps": level.cycle, "warmup_steps": level.warmup}
                self._joint.append(Nested(above, joint, estimator, **counts))
            else:
                check_ownership(above, joint)
                self._bilevel = BilevelStep(above, joint, estimator, seed=torch.initial_seed())

    @property
    def global_step(self) -> int:
        """The number of batches of the lowest problem."""
        return int(self._levels[-1].owner.count)

    def run(self) -> None:
        """Do ``train_iters`` steps of the lowest problem, and those above that follow."""
        self._train(True)
        stride, every = prod(x.cycle for x in self._levels[2:]), self.config.valid_step
        while self.config.train_iters - (before := self.global_step) >= stride:
            self.train_step()
            due = self.global_step // every > before // every
            if due and hasattr(self, "validation") and self._validate():
                break

    def train_step(self) -> None:
        """A step of the lowest problem, or of the second of three or more, and what follows."""
        top, *below = self._levels
        if not below:
            top.step(top.gradient(top.next_batch(), top.variables).gradient)
            return
        self._bilevel.train_lower()
        if below[0].due:
            above = self._bilevel.hypergradient(top.next_batch(), number=top.owner.count)
            top.step(above.hypergradient, above.grad_norm)
            for level, joint in zip(reversed(below), self._joint, strict=True):
                if level.rolls:
                    level.repeat(joint)
            self._bilevel.forget()

    def _report(self, numbers: Mapping[str, Any], *heads: str) -> None:
        values = ((k, x.item() if isinstance(x, Tensor) else x) for k, x in numbers.items())
        shown = " || ".join(f"{name}: {x}" for name, x in values)
        print(*(f"[{x}]" for x in (*heads, f"Global Step {self.global_step}")), shown, flush=True)

    def _train(self, mode: bool) -> None:
        for problem in self.problems:
            problem.train() if mode else problem.eval()

    def _validate(self) -> bool:  # whether to stop
        self._train(False)
        numbers, config = self.validation() or {}, self.config  # type: ignore[attr-defined]
        self._report(numbers, "Validation")
        self._train(True)
        if not config.early_stopping:
            return False
        if (metric := config.early_stopping_metric) not in numbers:
            raise ProblemError(f"early_stopping_metric: validation returned no {metric!r}")
        self._scores.append(float(numbers[metric]) * (-1) ** (config.early_stopping_mode == "max"))
        best = self._scores.index(min(self._scores))
        return len(self._scores) - best > int(config.early_stopping_tolerance)
