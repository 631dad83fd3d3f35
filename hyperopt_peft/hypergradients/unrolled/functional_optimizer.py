"""A torch optimizer's step as a function of variables, gradient and state, through TorchOpt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchopt
from torch import Tensor
from torch.autograd import forward_ad
from torchopt.transform.scale_by_adam import ScaleByAdamState
from torchopt.transform.trace import TraceState

from hyperopt_peft.core.optimizer import LEARNT, options_by_group, require_known
from hyperopt_peft.core.problem import Problem, StepRecord
from hyperopt_peft.utils.vector import Vector, widened


def _sgd(group: Mapping[str, Any]) -> Any:
    return torchopt.sgd(
        1.0,
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
    )


def _adam(group: Mapping[str, Any]) -> Any:
    # The square root has no derivative at 0, and Adam's second moment is 0 where a gradient has
    # always been 0 (lora_A's, at B = 0). 1e-36 keeps the derivative finite, and is far below eps².
    return torchopt.adam(
        1.0, betas=tuple(map(float, group["betas"])), eps=group["eps"], eps_root=1e-36
    )


@dataclass(frozen=True)
class _Form:
    """How TorchOpt makes an optimizer, and the names torch gives its moments.

    The learning rate is 1 and there is no decay: TorchOpt takes these as plain floats only.
    """

    make: Callable[[Mapping[str, Any]], Any]
    moments: tuple[str, ...]


_FORMS: dict[type, _Form] = {
    torch.optim.SGD: _Form(_sgd, ("momentum_buffer",)),
    torch.optim.Adam: _Form(_adam, ("exp_avg", "exp_avg_sq")),
    torch.optim.AdamW: _Form(_adam, ("exp_avg", "exp_avg_sq")),
}


class FunctionalOptimizer:
    """Φ(w, g, moments, options) → (w', moments'), the step of a level's optimizer with clipping.

    ``snapshot`` is what `hyperopt_peft.snapshots.snapshot` returned for it. The options that are
    differentiated are those of `Problem.optimizer_options`, as they are now; the others, and all
    where that has none, are the snapshot's.

    Raises:
        ProblemError: the level has no optimizer, or one that has no functional form here.
    """

    def __init__(self, level: Problem, snapshot: Mapping[str, Any]) -> None:
        require_known(level.name, snapshot, _FORMS)
        kind = snapshot["kind"]
        form = _FORMS[kind]
        # Without momentum a plain gradient step keeps nothing.
        still = all(group.get("momentum") == 0 for group in snapshot["groups"])
        self._make, self.moment_names = form.make, () if still else form.moments
        self._decoupled = kind is torch.optim.AdamW
        self.max_grad_norm = level.max_grad_norm
        self._learnt = options_by_group(level)
        if level.optimizer is not None:  # as the snapshot, without groups of no variable
            pairs = zip(level.optimizer.param_groups, self._learnt, strict=False)
            self._learnt = [options for group, options in pairs if group["params"]]
        #: The options that are functions of upper variables, with their graphs.
        self.options = [value for options in self._learnt for value in options.values()]

    def moments(self, parts: Sequence[Tensor]) -> dict[str, Vector]:
        """Moments as `vjp` and `jvp` have them, as vectors shaped like w, by torch's names."""
        width = len(self.moment_names)
        return {name: Vector(parts[k::width]) for k, name in enumerate(self.moment_names)}

    def vjp(
        self, step: StepRecord, adjoint: Vector, moment_adjoint: Sequence[Tensor] | None
    ) -> tuple[Vector, Vector, list[Tensor], list[Tensor]]:
        """Cotangents of Φ's arguments from those of (w', moments'), None standing for zeros."""
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
        n, m = len(inputs[0]), len(inputs[2])
        return (
            Vector(bars[:n]),
            Vector(bars[n : 2 * n]),
            list(bars[2 * n : 2 * n + m]),
            list(bars[2 * n + m :]),
        )

    def jvp(
        self,
        step: StepRecord,
        point: Vector,
        gradient: Vector,
        moments: Sequence[Tensor],
        options: Sequence[Tensor],
    ) -> tuple[Vector, list[Tensor]]:
        """Tangents of (w', moments') from those of Φ's arguments."""
        inputs = self._inputs(step)
        tangents = (point.parts, gradient.parts, moments, options)
        with forward_ad.dual_level():
            duals = [
                [forward_ad.make_dual(x, t.to(x)) for x, t in zip(group, along, strict=True)]
                for group, along in zip(inputs, tangents, strict=True)
            ]
            after, moments_after = (
                [_tangent(x) for x in outputs] for outputs in self._apply(step, *duals)
            )
        return Vector(after), moments_after

    def pulled_back(self, options: Sequence[Tensor], variables: Sequence[Tensor]) -> Vector:
        """The cotangent of the upper ``variables`` from that of the options."""
        pairs = [(x, c.to(x)) for x, c in zip(self.options, options) if x.requires_grad]
        bars: Sequence[Tensor | None] = [None] * len(variables)
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            bars = torch.autograd.grad(
                outputs, variables, cotangents, retain_graph=True, allow_unused=True
            )
        return Vector.of(bars, variables)

    def advance(self, step: StepRecord) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The variables and the optimizer's snapshot after ``step``."""
        point, moments = self._apply(step, *self._inputs(step))
        assert step.optimizer is not None
        names = self.moment_names
        state = {
            i: {
                "step": self._count(step, i) + 1,
                **dict(zip(names, moments[i * len(names) :], strict=False)),
            }
            for i in range(len(point))
        }
        return tuple(point), {**step.optimizer, "state": state}

    def _inputs(
        self, step: StepRecord
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Fresh copies of Φ's arguments; moments are ordered by variable."""
        assert step.optimizer is not None
        point = _copies(step.variables)
        moments: list[Tensor] = []
        for i, variable in enumerate(point):
            state = step.optimizer["state"].get(i, {})
            held = [state.get(name) for name in self.moment_names]
            moments += [torch.zeros_like(variable) if m is None else m for m in held]
        gradient = Vector.of(step.gradient, point)
        return point, _copies(gradient), _copies(moments), _copies(self.options)

    def _count(self, step: StepRecord, index: int) -> float:
        assert step.optimizer is not None
        return float(step.optimizer["state"].get(index, {}).get("step", 0))

    def _apply(
        self,
        step: StepRecord,
        point: list[Tensor],
        gradient: list[Tensor],
        moments: list[Tensor],
        options: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        assert step.optimizer is not None
        groups, values = step.optimizer["groups"], iter(options)
        gradient = self._clipped(gradient)
        after, moments_after = list(point), list(moments)
        width = len(self.moment_names)
        for group, names in zip(groups, self._learnt or [{}] * len(groups), strict=True):
            group = {**group, **{name: next(values) for name in names}}
            # A variable that the loss did not read has no gradient, and torch leaves it alone.
            indices = [i for i in group["variables"] if step.gradient[i] is not None]
            transformation = self._make(group)
            params = tuple(point[i] for i in indices)
            grads = tuple(gradient[i] for i in indices)
            # To each variable's own device; a number is one already.
            lr, decay = ([_like(group[name], p) for p in params] for name in LEARNT)
            kept = params
            if self._decoupled or group.get("decoupled_weight_decay"):
                kept = tuple(p - a * (d * p) for p, a, d in zip(params, lr, decay))
            elif isinstance(group["weight_decay"], Tensor) or group["weight_decay"]:
                grads = tuple(g + d * p for g, d, p in zip(grads, decay, params))
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
                # The counts are float64, which a variable of no dimension would be promoted to.
                after[i] = (kept[position] + lr[position] * updates[position]).to(point[i].dtype)
                for k, column in enumerate(new):
                    moments_after[i * width + k] = column[position]
        return after, moments_after

    def _clipped(self, gradient: list[Tensor]) -> list[Tensor]:
        if self.max_grad_norm is None:
            return gradient
        norms = [torch.linalg.vector_norm(g).to(gradient[0].device) for g in gradient]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        return [g * factor.to(g) for g in gradient]


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [widened(tensor.detach().clone()) for tensor in tensors]


def _like(option: Tensor | float, variable: Tensor) -> Tensor | float:
    return option.to(variable) if isinstance(option, Tensor) else option


def _tangent(dual: Tensor) -> Tensor:
    value, tangent = forward_ad.unpack_dual(dual)
    return torch.zeros_like(value) if tangent is None else tangent


def _filled(part: Any, held: list[list[Tensor]], counts: list[Tensor]) -> Any:
    if isinstance(part, ScaleByAdamState):
        return part._replace(mu=held[0], nu=held[1], count=counts)
    return part._replace(trace=held[0]) if isinstance(part, TraceState) else part


def _moments(part: Any) -> list[Sequence[Tensor]]:
    if isinstance(part, ScaleByAdamState):
        return [part.mu, part.nu]
    return [part.trace] if isinstance(part, TraceState) else []
