"""The lower optimizer's step as a differentiable function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem, StepRecord
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import is_sharded, to_local
from hyperopt_peft.utils.vector import Vector, dot, widened

#: c, ‖g‖ and g, for a step along the clipped gradient c·g.
Clipping = tuple[float, float, Vector]


class DifferentiableStep:
    """Φ(w, g, moments) → (w', moments'), the step of a level's optimizer with clipping.

    The optimizer is torch's SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax or RAdam, with any
    options but ``amsgrad``.

    Args:
        level: the level.
        snapshot: a `Problem.optimizer_snapshot` with the options.

    Raises:
        ProblemError: the level has no optimizer, or another one, or one with step hooks.
    """

    def __init__(self, level: Problem, snapshot: Mapping[str, Any]) -> None:
        # Imported here so that other estimators do not load TorchOpt.
        from hyperopt_peft.hypergradients.unrolled.optimizer_rules import RULES

        kind = snapshot["kind"]
        if kind is None:
            raise ProblemError(
                f"{level.name}: the level has no optimizer, and the estimator differentiates its "
                "step; give the level one"
            )
        if kind not in RULES or any(group.get("amsgrad") for group in snapshot["groups"]):
            raise ProblemError(
                f"{level.name}: a step of {kind.__name__} cannot be differentiated; use one of "
                f"{', '.join(each.__name__ for each in RULES)}, without amsgrad"
            )
        optimizer = getattr(level.optimizer, "optimizer", level.optimizer)  # accelerate wraps it
        if any(getattr(optimizer, f"_optimizer_step_{when}_hooks", 0) for when in ("pre", "post")):
            raise ProblemError(
                f"{level.name}: the optimizer has step hooks, which have no derivative; remove them"
            )
        self.level, self._rule = level, RULES[kind]
        self._decoupled = kind is torch.optim.AdamW
        used = [self._rule.names(group) for group in snapshot["groups"]]
        #: torch's names for the moments of all groups.
        self.moment_names = tuple(dict.fromkeys(name for names in used for name in names))

    def vjp(
        self, step: StepRecord, adjoint: Vector, moment_adjoint: Sequence[Tensor] | None = None
    ) -> tuple[Vector, Vector, list[Tensor]]:
        """Cotangents of (w, g, moments), given cotangents of (w', moments') or None."""
        clipping = self._clipping(step)
        leaves = [[x.requires_grad_() for x in group] for group in self._inputs(step, clipping)]
        point, moments = self._apply(step, *leaves)
        outputs, cotangents = list(point), list(to_local(adjoint))
        if moment_adjoint is not None:
            # If a variable's group lacks a moment, zeros without a graph take its place.
            pairs = [(m, c) for m, c in zip(moments, moment_adjoint) if m.requires_grad]
            outputs += [m for m, _ in pairs]
            cotangents += [c for _, c in pairs]
        flat = [x for group in leaves for x in group]
        bars = torch.autograd.grad(outputs, flat, cotangents, materialize_grads=True)
        n = len(leaves[0])
        return (
            _shaped(bars[:n], step.variables),
            _clipping_derivative(clipping, _shaped(bars[n : 2 * n], step.variables)),
            list(bars[2 * n :]),
        )

    def advance(self, step: StepRecord) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The variables and the optimizer's snapshot after ``step``."""
        point, moments = self._apply(step, *self._inputs(step, self._clipping(step)))
        width = len(self.moment_names)
        state = {i: dict(_state(step, i)) for i in range(len(point))}
        for i, gradient in enumerate(step.gradient):
            if gradient is not None:
                new = dict(zip(self.moment_names, moments[i * width :], strict=False))
                state[i] |= {"step": _count(step, i) + 1, **new}
        return tuple(point), {**step.optimizer, "state": state}

    def _inputs(
        self, step: StepRecord, clipping: Clipping
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Copies of Φ's arguments, with clipped g; only the local shard of each tensor."""
        point = _copies(step.variables)
        moments: list[Tensor] = []
        for i, variable in enumerate(point):
            stored = [_state(step, i).get(name) for name in self.moment_names]
            moments += [torch.zeros_like(variable) if m is None else m for m in stored]
        factor, _, gradient = clipping
        clipped = gradient if factor == 1 else gradient * factor
        return point, _copies(clipped), _copies(moments)

    def _apply(
        self,
        step: StepRecord,
        point: list[Tensor],
        gradient: list[Tensor],
        moments: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        after, moments_after = list(point), list(moments)
        width = len(self.moment_names)
        for group in step.optimizer["groups"]:
            for i in group["variables"]:
                if step.gradient[i] is None:  # torch does not move this variable
                    continue
                w, g = point[i], -gradient[i] if group["maximize"] else gradient[i]
                # An option that is a tensor moves to each variable's device.
                both = group["lr"], group["weight_decay"]
                lr, decay = (o.to(w) if isinstance(o, Tensor) else o for o in both)
                if self._decoupled or group.get("decoupled_weight_decay"):
                    w = w - lr * (decay * w)
                elif isinstance(decay, Tensor) or decay:
                    g = g + decay * w
                old = dict(zip(self.moment_names, moments[i * width :]))
                fresh, count = not _state(step, i), _count(step, i)
                update, new = self._rule.update(group, g, old, count, fresh)
                # The float64 step count promotes zero-dimensional variables.
                after[i] = (w + lr * update).to(point[i].dtype)
                for k, name in enumerate(self.moment_names):
                    moments_after[i * width + k] = new.get(name, moments[i * width + k])
        return after, moments_after

    def _clipping(self, step: StepRecord) -> Clipping:
        """c, ‖g‖ and g."""
        gradient = Vector.of(step.gradient, step.variables)
        norm = gradient.norm() if self.level.max_grad_norm is not None else 0.0
        return self.level.clipping(norm), norm, gradient


def _clipping_derivative(clipping: Clipping, x: Vector) -> Vector:
    """d(cg)/dg·x = c·x − c⟨g, x⟩/(‖g‖(‖g‖ + 1e-6))·g, for c < 1; the matrix is symmetric."""
    factor, norm, g = clipping
    if factor == 1:
        return x
    along = dot(g, x) / (norm * (norm + 1e-6)) if norm else 0.0
    return (x - along * g) * factor


def _state(step: StepRecord, index: int) -> Mapping[str, Any]:
    state: Mapping[str, Any] = step.optimizer["state"].get(index, {})
    return state


def _count(step: StepRecord, index: int) -> int:
    return int(_state(step, index).get("step", 0))


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [widened(tensor.detach().clone()) for tensor in to_local(tensors)]


def _shaped(parts: Sequence[Tensor], like: Sequence[Tensor]) -> Vector:
    """The vector with local shards ``parts``, sharded like ``like``."""
    if not is_sharded(*like):
        return Vector(parts)
    full = [widened(torch.zeros_like(x)) for x in like]
    for x, part in zip(to_local(full), parts, strict=True):
        x.copy_(part)
    return Vector(full)
