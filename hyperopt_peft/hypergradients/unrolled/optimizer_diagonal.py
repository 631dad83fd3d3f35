"""What the lower optimizer's step does to each entry of a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, RMSprop

from hyperopt_peft.core.optimizer import require_known
from hyperopt_peft.core.problem import Problem, StepRecord
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.utils.reductions import norm
from hyperopt_peft.utils.vector import Vector, widened


@dataclass(frozen=True)
class _Form(ABC):
    """One variable's part of a step: ``g`` as the optimizer reads it, ``state`` from before it.

    ``moved`` is False for a variable that had no gradient, which the step left alone.
    """

    g: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    moved: bool

    @abstractmethod
    def slope(self) -> Tensor:
        """−∂w'/∂g."""

    def average(self, name: str, weight: float, of: Tensor) -> Tensor:
        """The running average that the optimizer keeps as ``name``, after the step."""
        kept = self.state.get(name)
        before = torch.zeros_like(self.g) if kept is None else widened(kept)
        return weight * before + (1 - weight) * of if self.moved else before


class _Adam(_Form):
    """g ↦ lr·(m/c1)/(√(v/c2) + eps), with c = 1 − βᵗ."""

    def slope(self) -> Tensor:
        """lr·[(1−β1)/(c1·r) − (m/c1)(1−β2)g/(c2·s·r²)] with s = √(v/c2) and r = s + eps."""
        beta1, beta2 = map(float, self.group["betas"])
        m, s = self.average("exp_avg", beta1, self.g), self._root()
        r = s + float(self.group["eps"])
        # Where v is 0 every gradient has been, and m is 0 as well.
        of_root = torch.where(s > 0, (1 - beta2) / (1 - beta2**self._count) * self.g / s, 0.0)
        rate: float = float(self.group["lr"]) / (1 - beta1**self._count)
        return rate / r * ((1 - beta1) - m / r * of_root)

    @property
    def _count(self) -> float:
        return float(self.state.get("step", 0)) + self.moved

    def _root(self) -> Tensor:
        beta = float(self.group["betas"][1])
        v = self.average("exp_avg_sq", beta, self.g.square())
        return (v / (1 - beta**self._count)).sqrt() if self._count else v


class _RMSprop(_Form):
    """g ↦ lr·g/(√(v − a²) + eps), a = 0 unless ``centered``; momentum adds what g does not move."""

    def slope(self) -> Tensor:
        """lr·[1/r − g·(1−α)(g − a)/(s·r²)] with s = √(v − a²) and r = s + eps."""
        s = self._root()
        r = s + float(self.group["eps"])
        spread = (1 - self.group["alpha"]) * (self.g - self._mean())
        of_root = torch.where(s > 0, spread / s, 0.0)
        return float(self.group["lr"]) / r * (1 - self.g / r * of_root)

    def _mean(self) -> Tensor:
        if not self.group["centered"]:
            return torch.zeros_like(self.g)
        return self.average("grad_avg", self.group["alpha"], self.g)

    def _root(self) -> Tensor:
        square = self.average("square_avg", self.group["alpha"], self.g.square())
        return (square - self._mean().square()).clamp(min=0).sqrt()


class _SGD(_Form):
    """g ↦ lr·(momentum·buffer + (1 − dampening)·g)."""

    def slope(self) -> Tensor:
        """lr times the share of g in the step."""
        momentum, share = self.group["momentum"], 1.0
        if momentum and self.state.get("momentum_buffer") is not None:
            share = 1.0 - self.group["dampening"]  # a new buffer is the gradient itself
        if self.group["nesterov"]:
            share = 1.0 + momentum * share
        return torch.full_like(self.g, float(self.group["lr"]) * share)


_FORMS: dict[type, type[_Form]] = {SGD: _SGD, Adam: _Adam, AdamW: _Adam, RMSprop: _RMSprop}


def step_slope(level: Problem, step: StepRecord) -> Vector:
    """D = −∂w'/∂g of ``step``, w ↦ w', along the diagonal: the optimizer works entry by entry.

    L2 weight decay is part of g, AdamW's is not in D. Clipping is taken to be a constant factor,
    which D is evaluated with and multiplied by. D is 0 for a variable without gradient, which
    the step leaves alone.

    Raises:
        ProblemError: the level has no optimizer, or one whose diagonal is not known here.
    """
    factor = _clipping(level, step)

    def slope(form: _Form) -> Tensor:
        return form.slope().mul_(factor) if form.moved else torch.zeros_like(form.g)

    return _diagonal(level, step, factor, slope)


def require_diagonal(level: Problem) -> None:
    """Raise ProblemError where the level has an optimizer whose diagonal is not known here."""
    if level.optimizer is not None:
        require_known(level.name, level.optimizer_snapshot(with_state=False), _FORMS)


def last_step(oracle: Oracle) -> StepRecord:
    """The last recorded lower step; out of training the one that would be taken next.

    The latter needs ∂f/∂w at the current point, one forward+backward.
    """
    if oracle.history:
        return oracle.history[-1]
    lower, gradient = oracle.lower, oracle.lower_parts()
    snapshot = lower.optimizer_snapshot(with_state=True)
    return StepRecord(
        oracle.lower_batch, oracle.lower_random, lower.variables, gradient, None, snapshot
    )


def _diagonal(
    level: Problem, step: StepRecord, factor: float, entries: Callable[[_Form], Tensor]
) -> Vector:
    snapshot = step.optimizer
    assert snapshot is not None
    require_known(level.name, snapshot, _FORMS)
    result: dict[int, Tensor] = {}
    with torch.no_grad():
        for group in snapshot["groups"]:
            for i in group["variables"]:
                w, gradient = widened(step.variables[i]), step.gradient[i]
                g = torch.zeros_like(w) if gradient is None else widened(gradient)
                g = g if factor == 1 else factor * g
                decay = group["weight_decay"]
                # torch's AdamW is an Adam whose groups say so.
                decoupled = snapshot["kind"] is AdamW or group.get("decoupled_weight_decay")
                if decay and not decoupled:
                    g = g + decay * w
                form = _FORMS[snapshot["kind"]]
                state = snapshot["state"].get(i, {})
                result[i] = entries(form(g, group, state, gradient is not None))
    return Vector(result[i] for i in range(len(step.variables)))


def _clipping(level: Problem, step: StepRecord) -> float:
    """The factor by which the gradient was scaled before the step."""
    if level.max_grad_norm is None:
        return 1.0
    return level.clipping(norm(g for g in step.gradient if g is not None))
