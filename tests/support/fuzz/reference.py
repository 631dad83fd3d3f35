"""Hypergradients in float64 from first-order gradients alone."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.fuzz.grammar import Form
from tests.support.fuzz.levels import Levels

H = 1e-5
MULTIPLIER = 1000.0  # of the estimator "f2sa"


def restore(state: Any) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def current() -> Any:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def flat(tensors: Any) -> Tensor:
    """All real numbers of ``tensors``, ``(n,)``, in float64."""
    parts = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    return torch.cat([x.detach().reshape(-1).double() for x in parts])


def optimizer_of(form: Form, tensors: Any) -> torch.optim.Optimizer:
    if form.optimizer == "adam":
        return torch.optim.Adam(tensors, lr=0.05, eps=1e-3)
    return torch.optim.SGD(tensors, lr=0.1, momentum=0.9 if form.optimizer == "momentum" else 0.0)


class Functions:
    """First-order gradients of both losses of a form, at any point and random state."""

    def __init__(self, form: Form, curvature: float) -> None:
        self.form, self.plain = form, Levels(form, plain=True, curvature=curvature)
        self.w, self.u = flat(self.plain.w), flat(self.plain.u)
        self._w0 = self.w.clone()

    def gradient(self, level: str, w: Tensor, u: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """(∂/∂w, ∂/∂u) of a level's loss, ``(n,)`` and ``(m,)``."""
        self._move(self.plain.w, w)
        self._move(self.plain.u, u)
        restore(state)
        variables = (*self.plain.w, *self.plain.u)
        loss = self.plain.loss(level)
        slopes = torch.autograd.grad(loss, variables, allow_unused=True)
        both = [torch.zeros_like(x) if g is None else g for x, g in zip(variables, slopes)]
        n = len(self.plain.w)
        of_w = flat(both[:n])
        if self.form.prior == "lower" and level == "lower":
            of_w = of_w + 0.3 * (w - self._w0) / len(w)
        return of_w, flat(both[n:])

    @torch.no_grad()
    def _move(self, variables: tuple[Tensor, ...], values: Tensor) -> None:
        at = 0
        for x in variables:
            real = torch.view_as_real(x) if x.is_complex() else x
            real.copy_(values[at : at + real.numel()].view(real.shape))
            at += real.numel()

    def second(self, w: Tensor, u: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """∂²f/∂w² ``(n, n)`` and ∂²f/∂u∂w ``(m, n)``, by central differences."""
        columns = []
        for unit in torch.eye(len(w), dtype=torch.float64):
            ahead = self.gradient("lower", w + H * unit, u, state)
            behind = self.gradient("lower", w - H * unit, u, state)
            columns.append([(a - b) / (2 * H) for a, b in zip(ahead, behind, strict=True)])
        hessian, mixed = (torch.stack(part, dim=1) for part in zip(*columns, strict=True))
        return (hessian + hessian.T) / 2, mixed

    def steps(self, w: Tensor, us: list[Tensor], states: list[Any], fresh: Any) -> Tensor:
        """w after a step of the lower optimizer ``fresh()`` at each of ``us`` and ``states``."""
        point = w.clone().requires_grad_()
        optimizer = fresh(point)
        for u, state in zip(us, states, strict=True):
            point.grad, _ = self.gradient("lower", point.detach(), u, state)
            optimizer.step()
        return point.detach()

    def unrolled(
        self, w: Tensor, u: Tensor, states: list[Any], fresh: Any, *, resting: int = 0
    ) -> Tensor:
        """dw_K/du ``(n, m)`` by central differences of the fourth order, since Adam bends sharply.

        u does not move in the first ``resting`` steps.
        """

        def ends(x: Tensor) -> Tensor:
            return self.steps(w, [u] * resting + [x] * (len(states) - resting), states, fresh)

        columns = []
        for e in torch.eye(len(u), dtype=torch.float64):
            near, far = (ends(u + k * H * e) - ends(u - k * H * e) for k in (1, 2))
            columns.append((8 * near - far) / (12 * H))
        return torch.stack(columns, dim=1)


def weight_of_squares(form: Form, state: Any) -> float:
    """The weight of ½‖w‖² that makes H regular, and definite unless the form says otherwise."""
    functions = Functions(form, 0.0)
    hessian, _ = functions.second(functions.w, functions.u, state)
    values = torch.linalg.eigvalsh(hessian)
    if form.curvature == "indefinite":  # zero is where no eigenvalue is near
        gaps = values.diff()
        widest = int(gaps[: max(1, len(gaps) // 2)].argmax())
        return float(-(values[widest] + values[widest + 1]) / 2)
    return float(max(-values.min(), 0.0) + 0.25 * values.abs().max())


class Point:
    """The derivatives at one point: ∂F/∂u (d), ∂F/∂w (b), ∂²f/∂w² (h), ∂²f/∂u∂w (m)."""

    def __init__(
        self, functions: Functions, w: Tensor, u: Tensor, upper_state: Any, lower_state: Any
    ) -> None:
        self.functions, self.w, self.u = functions, w, u
        self.upper_state, self.lower_state = upper_state, lower_state
        self.b, self.d = functions.gradient("upper", w, u, upper_state)
        self.h, self.m = functions.second(w, u, lower_state)
        self.inverse = torch.linalg.pinv(self.h, hermitian=True, rtol=1e-7)
        eigenvalues = torch.linalg.eigvalsh(self.h)
        self.definite = bool(eigenvalues.min() > 1e-3 * eigenvalues.max())

    @property
    def truth(self) -> Tensor:
        return self.d - self.m @ (self.inverse @ self.b)

    def darts(self, xi: float) -> Tensor:
        return self.d - xi * self.m @ self.b

    def damped(self, damping: float) -> Tensor:
        eye = torch.eye(len(self.w), dtype=torch.float64)
        return self.d - self.m @ torch.linalg.solve(self.h + damping * eye, self.b)

    def neumann(self, terms: int, step_size: float) -> Tensor:
        p, total = self.b, self.b
        for _ in range(terms):
            p = p - step_size * self.h @ p
            total = total + p
        return self.d - step_size * self.m @ total

    def penalised(self) -> Tensor:
        """∂F/∂u(y) + λ(∂f/∂u(y) − ∂f/∂u(w)), λ(∂f/∂w(y) − ∂f/∂w(w)) + ∂F/∂w(y) = 0."""

        def gradients(y: Tensor) -> tuple[Tensor, Tensor]:
            below = self.functions.gradient("lower", y, self.u, self.lower_state)
            above = self.functions.gradient("upper", y, self.u, self.upper_state)
            of_w, of_u = (x + MULTIPLIER * (z - at_w) for x, z, at_w in zip(above, below, here))
            return of_w, of_u

        here = self.functions.gradient("lower", self.w, self.u, self.lower_state)
        y = self.w
        for _ in range(100):  # Newton's, without the Hessian of F
            step = self.inverse @ gradients(y)[0] / MULTIPLIER
            y = y - step
            if step.norm() < 1e-12:
                break
        return gradients(y)[1]

    def unrolled(self, steps: int, fresh: Callable[[Tensor], Any]) -> Tensor:
        """Through simulated steps from w, with ∂F/∂w at w."""
        states = [self.lower_state] * steps
        jacobian = self.functions.unrolled(self.w, self.u, states, fresh)
        return self.d + jacobian.T @ self.b
