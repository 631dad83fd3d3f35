"""A torch optimizer's step as a function of variables, gradient and state, through TorchOpt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.trace import TraceState

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.vector import Vector, widened
from hyperopt_peft.problem import Problem, Step


def _sgd(group: Mapping[str, Any]) -> Any:
    return torchopt.sgd(
        float(group["lr"]),
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        weight_decay=group["weight_decay"],
    )


def _adam(group: Mapping[str, Any], *, decoupled: bool = False) -> Any:
    # The square root has no derivative at 0, and Adam's second moment is 0 where a gradient has
    # always been 0 (lora_A's, at B = 0). 1e-36 keeps the derivative finite, and is far below eps².
    decoupled = decoupled or group.get("decoupled_weight_decay", False)
    make = torchopt.adamw if decoupled else torchopt.adam
    return make(
        float(group["lr"]),
        betas=tuple(map(float, group["betas"])),
        eps=group["eps"],
        eps_root=1e-36,
        weight_decay=group["weight_decay"],
    )


@dataclass(frozen=True)
class _Form:
    """How TorchOpt makes an optimizer, and the names torch gives its moments."""

    make: Callable[[Mapping[str, Any]], Any]
    moments: tuple[str, ...]


_FORMS: dict[type, _Form] = {
    torch.optim.SGD: _Form(_sgd, ("momentum_buffer",)),
    torch.optim.Adam: _Form(_adam, ("exp_avg", "exp_avg_sq")),
    torch.optim.AdamW: _Form(partial(_adam, decoupled=True), ("exp_avg", "exp_avg_sq")),
}


class FunctionalOptimizer:
    """Φ(w, g, moments) → (w', moments'), the step of a level's optimizer, clipping included.

    ``snapshot`` is what `hyperopt_peft.snapshots.snapshot` returned for it.

    Raises:
        ProblemError: the level has no optimizer, or one that has no functional form here.
    """

    def __init__(self, level: Problem, snapshot: Mapping[str, Any]) -> None:
        kind = snapshot["kind"]
        if kind is None:
            raise ProblemError(f"{level.name}: unrolling needs the level's optimizer; give it one")
        if kind not in _FORMS:
            raise ProblemError(
                f"{level.name}: {kind.__name__} cannot be unrolled; use one of "
                f"{', '.join(known.__name__ for known in _FORMS)}"
            )
        for group in snapshot["groups"]:
            for flag in ("amsgrad", "maximize"):
                if group.get(flag):
                    raise ProblemError(f"{level.name}: an optimizer with {flag} cannot be unrolled")
        self.form = _FORMS[kind]
        self.max_grad_norm = level.max_grad_norm

    def vjp(
        self, step: Step, adjoint: Vector, moment_adjoint: Sequence[Tensor] | None
    ) -> tuple[Vector, Vector, list[Tensor]]:
        """Cotangents of (w, g, moments) from those of (w', moments'), None standing for zeros."""
        inputs = self._inputs(step)
        leaves = [[x.requires_grad_() for x in group] for group in inputs]
        point, moments = self._apply(step, *leaves)
        outputs, cotangents = list(point), list(adjoint.parts)
        if moment_adjoint is not None:
            # A moment that does not depend on the leaves (SGD without momentum) has no graph.
            pairs = [(m, c) for m, c in zip(moments, moment_adjoint) if m.requires_grad]
            outputs += [m for m, _ in pairs]
            cotangents += [c for _, c in pairs]
        flat = [x for group in leaves for x in group]
        bars = torch.autograd.grad(outputs, flat, cotangents, materialize_grads=True)
        n = len(inputs[0])
        return Vector(bars[:n]), Vector(bars[n : 2 * n]), list(bars[2 * n :])

    @torch.no_grad()
    def advance(self, step: Step) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The variables and the optimizer's snapshot after ``step``."""
        point, moments = self._apply(step, *self._inputs(step))
        assert step.optimizer is not None
        names = self.form.moments
        state = {
            i: {
                "step": self._count(step, i) + 1,
                **dict(zip(names, moments[i * len(names) :], strict=False)),
            }
            for i in range(len(point))
        }
        return tuple(point), {**step.optimizer, "state": state}

    def _inputs(self, step: Step) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Fresh copies of w, g and the moments, moments ordered by variable."""
        assert step.optimizer is not None
        point = _copies(step.variables)
        moments: list[Tensor] = []
        for i, variable in enumerate(point):
            state = step.optimizer["state"].get(i, {})
            held = [state.get(name) for name in self.form.moments]
            moments += [torch.zeros_like(variable) if m is None else m for m in held]
        gradient = Vector.of(step.gradient, point)
        return point, _copies(gradient), _copies(moments)

    def _count(self, step: Step, index: int) -> float:
        assert step.optimizer is not None
        return float(step.optimizer["state"].get(index, {}).get("step", 0))

    def _apply(
        self, step: Step, point: list[Tensor], gradient: list[Tensor], moments: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        assert step.optimizer is not None
        gradient = self._clipped(gradient)
        after, moments_after = list(point), list(moments)
        width = len(self.form.moments)
        for group in step.optimizer["groups"]:
            # A variable that the loss did not read has no gradient, and torch leaves it alone.
            indices = [i for i in group["variables"] if step.gradient[i] is not None]
            if not indices:
                continue
            transformation = self.form.make(group)
            params = tuple(point[i] for i in indices)
            grads = tuple(gradient[i] for i in indices)
            state = transformation.init(params)
            if any(i in step.optimizer["state"] for i in indices):
                # TorchOpt's momentum skips decay and dampening in its first call, as torch does
                # where a buffer is new; these are not.
                transformation.update(
                    tuple(map(torch.zeros_like, grads)), state, params=params, inplace=False
                )
            held = [[moments[i * width + k] for i in indices] for k in range(width)]
            counts = [torch.tensor(self._count(step, i), dtype=torch.float64) for i in indices]
            state = tuple(_filled(part, held, counts) for part in state)
            updates, state = transformation.update(grads, state, params=params, inplace=False)
            new = [x for part in state for x in _moments(part)]
            for position, i in enumerate(indices):
                after[i] = point[i] + updates[position]
                for k, column in enumerate(new):
                    moments_after[i * width + k] = column[position]
        return after, moments_after

    def _clipped(self, gradient: list[Tensor]) -> list[Tensor]:
        if self.max_grad_norm is None:
            return gradient
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(g) for g in gradient])
        )
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        return [g * factor for g in gradient]


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [widened(tensor.detach().clone()) for tensor in tensors]


def _filled(part: Any, held: list[list[Tensor]], counts: list[Tensor]) -> Any:
    if isinstance(part, ScaleByAdamState):
        return part._replace(mu=held[0], nu=held[1], count=counts)
    return part._replace(trace=held[0]) if isinstance(part, TraceState) else part


def _moments(part: Any) -> list[Sequence[Tensor]]:
    if isinstance(part, ScaleByAdamState):
        return [part.mu, part.nu]
    return [part.trace] if isinstance(part, TraceState) else []
