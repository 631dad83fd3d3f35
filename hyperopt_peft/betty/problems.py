"""Betty's problems, each with a level of this library."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.betty.configs import Config, Scripted
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.restore import assign_

PARTS = ("train_data_loader", "module", "optimizer", "scheduler")


class ImplicitProblem(Scripted):
    """One level of a script that was written for Betty; the example is that of `Engine`.

    A subclass defines ``training_step(batch)``, which returns a scalar or a mapping with the scalar
    under ``"loss"``, and may define ``configure_module`` and the like, ``on_inner_loop_start``,
    ``grad_callback`` (before a step) and ``param_callback`` (after). The level owns those of
    ``trainable_parameters()`` that the optimizer holds and that require a gradient.

    Raises:
        ProblemError: a part is missing or not supported.
    """

    def __init__(
        self,
        name: str,
        config: Config | None = None,
        module: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        train_data_loader: Any = None,
        extra_config: Any = None,
        device: Any = None,
    ) -> None:
        self.name, self.config, self.cfg = name, config or Config(), extra_config
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.train_data_loader, self.device, self.cur_batch = train_data_loader, device, None
        self.count = 0
        self.parents: list[ImplicitProblem] = []
        self.children: list[ImplicitProblem] = []

    @property
    def leaf(self) -> bool:
        """Whether no problem is below."""
        return not self.children

    def training_step(self, batch: Any) -> Any:
        """The loss on ``batch``; a subclass defines this method."""
        raise ProblemError(f"{self.name}: define training_step(self, batch)")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        return self.module(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    def parameters(self) -> list[Tensor]:
        """The module's parameters."""
        return list(self.module.parameters())

    def trainable_parameters(self) -> list[Tensor]:
        """As `parameters`; a subclass may name fewer."""
        return self.parameters()

    def train(self) -> None:
        """Set the module to training mode."""
        self.module.train()

    def eval(self) -> None:
        """Set the module to evaluation mode."""
        self.module.eval()

    def state_dict(self) -> dict[str, Any]:
        """The states of the module, the optimizer and, if there is one, the scheduler."""
        return {x: getattr(self, x).state_dict() for x in PARTS[1:] if getattr(self, x) is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`."""
        for part, state in state_dict.items():
            getattr(self, part).load_state_dict(state)


class IterativeProblem(ImplicitProblem):
    """Refused, as are ``HigherIterativeProblem`` and ``MetaIterativeProblem``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ProblemError(
            f'{type(self).__name__}: use ImplicitProblem, or hyperopt_peft.Engine with "unrolled"'
        )


HigherIterativeProblem = MetaIterativeProblem = IterativeProblem


class Level(Problem):
    """The level of the problem ``owner``, whose parts are made here."""

    def __init__(self, owner: ImplicitProblem, engine: Any) -> None:
        self.owner, self.engine, config = owner, engine, owner.config
        for part in PARTS:
            if (make := getattr(owner, f"configure_{part}", None)) and not getattr(owner, part):
                setattr(owner, part, make())
            if getattr(owner, part) is None and part != "scheduler":
                raise ProblemError(f"{owner.name}: give {part}, or define configure_{part}")
        if isinstance(owner.train_data_loader, tuple):
            raise ProblemError(f"{owner.name}: several loaders: give one, of joint batches")
        owner.device = owner.device or engine.device
        owner.module.to(owner.device)
        trained = {id(x) for x in owner.trainable_parameters() if x.requires_grad}
        for group in owner.optimizer.param_groups:
            group["params"] = [x for x in group["params"] if id(x) in trained]
        held = {id(x) for group in owner.optimizer.param_groups for x in group["params"]}
        super().__init__(
            [(name, x) for name, x in owner.module.named_parameters() if id(x) in held],
            data=owner.train_data_loader,
            optimizer=owner.optimizer,
            max_grad_norm=config.gradient_clipping or None,
            name=owner.name,
        )
        self.rolls = engine.config.roll_back and bool(owner.parents)
        self.cycle = config.unroll_steps * config.gradient_accumulation
        self.recent, self.pending, self.logged = deque[Any]([], config.gradient_accumulation), 0, 0

    @property
    def due(self) -> bool:
        """Whether the problem above takes a step now."""
        return (
            self.owner.count % self.cycle == 0 and self.owner.count > self.owner.config.warmup_steps
        )

    def call(self, hook: str) -> None:
        """Call a method of the problem if there is one."""
        getattr(self.owner, hook, lambda: None)()

    def moving(self) -> tuple[Tensor, ...]:
        """What steps and forward passes change."""
        return (*self.variables, *self.owner.module.buffers())

    def loss(self, batch: Any) -> Any:
        """The problem's loss in its precision."""
        half = self.owner.config.precision == "bf16"
        with torch.autocast(self.variables[0].device.type, torch.bfloat16, enabled=half):
            return self.owner.training_step(batch)

    def next_batch(self) -> Any:
        """The next batch; at the start of an inner loop after its hook and a snapshot."""
        if self.owner.count == 0 or self.due:
            self.call("on_inner_loop_start")
        if self.rolls and self.owner.count % self.cycle == 0:
            values = [x.detach().clone() for x in self.moving()]
            self.snapshot = values, deepcopy(self.owner.optimizer.state_dict())
        self.owner.count += 1
        self.owner.cur_batch = super().next_batch()
        self.recent.append(self.owner.cur_batch)
        return self.owner.cur_batch

    def differentiate(
        self, batch: Any, variables: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float], tuple[Tensor | None, ...]]:
        """As `Problem.differentiate`, with zeros for unused variables if those are allowed."""
        loss, metrics, gradient = super().differentiate(batch, variables)
        self.stats = {"loss": loss, **metrics}
        pairs, own = list(zip(variables, gradient, strict=True)), set(map(id, self.variables))
        self.unread = {id(x) for x, g in pairs if g is None and id(x) in own}
        if self.owner.config.allow_unused:
            gradient = tuple(torch.zeros_like(x) if id(x) in self.unread else g for x, g in pairs)
        return loss, metrics, gradient

    def step(self, gradient: Sequence[Tensor | None], norm: float | None = None) -> float:
        """Accumulate ``gradient``; a step after ``gradient_accumulation`` of them."""
        owner, count = self.owner, self.owner.config.gradient_accumulation
        skipped = self.unread if owner.leaf else set()
        for x, g in zip(self.variables, gradient, strict=True):
            if g is not None and id(x) not in skipped:
                g = g.to(x.dtype) / count
                x.grad = g if x.grad is None else x.grad + g
        self.call("grad_callback")
        self.pending = (self.pending + 1) % count
        if self.pending == 0:
            norm = super().step([x.grad for x in self.variables])
            self.call("param_callback")
        if owner.scheduler is not None and not self.rolls:
            owner.scheduler.step()
        if owner.config.log_step > 0 and owner.count % owner.config.log_step == 0:
            if self.logged < owner.count:  # the step is no repetition
                self.engine.report(self.stats, f"Problem {self.name}", f"Local Step {owner.count}")
            self.logged = owner.count
        return norm or 0.0

    def roll_back(self, level: Problem) -> None:
        """Repeat the last step from the start of the loop, with the new u (DARTS)."""
        assign_(self.moving(), self.snapshot[0])
        self.owner.optimizer.load_state_dict(self.snapshot[1])
        for batch in self.recent:
            level.step(level.gradient(batch, level.variables).gradient)
        if self.owner.scheduler is not None:
            self.owner.scheduler.step()
