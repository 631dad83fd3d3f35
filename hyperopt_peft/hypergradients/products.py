"""Second-derivative products of the lower objective f at one point.

A product is ``hessian(v) = ∂²f/∂w² v``, ``mixed(v) = ∂²f/∂u∂w v`` or ``tangent(v, e) =
∂²f/∂w² v + ∂²f/∂w∂u e``, on one batch and one random state. `ExactProduct` differentiates ∂f/∂w
once more; `DifferenceProduct` needs first-order passes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from hyperopt_peft.core.chain import differences
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils import distributed, reductions
from hyperopt_peft.utils.autograd import (
    graph_nodes,
    lacks_second_derivative,
    once_differentiable_functions,
    raises_when_differentiated,
)
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import Buffers, assign_, perturbed
from hyperopt_peft.utils.vector import Vector, inner, machine_epsilon

ProductKind = Literal["exact", "difference"]
Scheme = Literal["central", "forward"]
SHARDED = (
    "an exact product differentiates twice, which FSDP's shards cannot do; choose "
    'product="difference", which needs first-order passes only'
)

NESTED = (
    "the level stands on another, whose derivatives of second order would need a third; choose "
    'product="difference", which needs first-order passes only'
)


@dataclass
class Passes:
    """What an estimate cost: ``gradients`` are forward+backward passes, ``products`` second
    backward passes over a kept graph."""

    gradients: int = 0
    products: int = 0


@dataclass(frozen=True)
class Objective:
    """The lower objective on one batch, with the random numbers of every evaluation fixed.

    The value of f at each evaluation is added to ``losses`` and stays on its device. Gradients are
    not checked: a NaN shows in the numbers that a solver reads, and `estimate` reads the losses.
    """

    lower: Problem
    upper: Problem
    batch: Any
    random_state: RandomState
    passes: Passes
    buffers: Buffers
    losses: list[Tensor]

    def gradient(self, variables: tuple[Tensor, ...]) -> Vector:
        """∂f/∂variables at the current point, by one forward+backward."""
        return Vector.of(self.parts(variables), variables)

    def parts(self, variables: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """As ``gradient``, in the variables' dtypes; None where f does not read one."""
        self.passes.gradients += 1
        with replay(self.random_state):
            loss, _, gradient = self.lower.differentiate(self.batch, variables)
        self.losses.append(loss)
        self.buffers.restore()  # so that the next evaluation is of the same function
        return gradient


class Product(Protocol):
    """Second-derivative products at a fixed point."""

    def hessian(self, v: Vector) -> Vector:
        """∂²f/∂w² v, shaped like the lower variables."""

    def mixed(self, v: Vector) -> Vector:
        """∂²f/∂u∂w v, shaped like the upper variables."""

    def tangent(self, v: Vector, e: Vector) -> Vector:
        """∂²f/∂w² v + ∂²f/∂w∂u e: how ∂f/∂w changes as w moves along v and u along e."""


class ExactProduct:
    """Products by double backward on one kept graph (Pearlmutter 1994).

    Attention runs in its math kernel, the only one with a second derivative. A custom
    ``autograd.Function`` must have a differentiable backward, or be marked
    ``once_differentiable``, which is noticed.

    In a distributed run a product is the average over the processes.

    Raises:
        ProblemError: an operation of the loss has no second derivative, or a module is sharded.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        objective.passes.gradients += 1
        with replay(objective.random_state), sdpa_kernel(SDPBackend.MATH), _without_reducers():
            loss, _ = objective.lower.evaluate(objective.batch)
        objective.losses.append(distributed.average(loss))
        self._loss = loss
        self.gradient = _slopes(loss, objective.lower.variables)

    def hessian(self, v: Vector) -> Vector:
        """∂²f/∂w² v = ∂⟨∂f/∂w, v⟩/∂w."""
        return self._derivative(self.objective.lower.variables, v)

    def mixed(self, v: Vector) -> Vector:
        """∂²f/∂u∂w v = ∂⟨∂f/∂w, v⟩/∂u."""
        return self._derivative(self.objective.upper.variables, v)

    def tangent(self, v: Vector, e: Vector) -> Vector:
        """∂²f/∂w² v + ∂²f/∂w∂u e = ∂(⟨∂f/∂w, v⟩ + ⟨∂f/∂u, e⟩)/∂w."""
        return self._derivative(self.objective.lower.variables, v, e)

    @cached_property
    def _upper_gradient(self) -> tuple[Tensor, ...]:
        """∂f/∂u, with its graph."""
        return _slopes(self._loss, self.objective.upper.variables)

    def _derivative(
        self, variables: tuple[Tensor, ...], v: Vector, e: Vector | None = None
    ) -> Vector:
        self.objective.passes.products += 1
        slopes = list(zip(self.gradient, v, strict=True))
        if e is not None:
            slopes += zip(self._upper_gradient, e, strict=True)
        pairs = [(g, x.to(g)) for g, x in slopes if g.requires_grad]
        if not pairs:  # f is linear
            return Vector.of([None] * len(variables), variables)
        outputs, cotangents = zip(*pairs, strict=True)
        with _second_derivatives():
            result = torch.autograd.grad(
                outputs, variables, cotangents, retain_graph=True, allow_unused=True
            )
        return Vector.of(distributed.mean(result, variables), variables)


def _slopes(loss: Tensor, variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """∂loss/∂variables with a graph, zero where the loss does not read one."""
    with _second_derivatives():
        slopes = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
        # Autograd never reaches their error: it leads nowhere, or is not even in the graph.
        marked = once_differentiable_functions(loss)
        if marked or any(map(raises_when_differentiated, graph_nodes(slopes))):
            names = ", ".join(marked) or "a function"
            raise RuntimeError(f"{names} is marked once_differentiable, not twice")
        return slopes


@dataclass
class DifferenceProduct:
    """Products by finite differences of ∂f/∂w and ∂f/∂u along v, with h = epsilon/‖v‖.

    Central: (g(w+hv) − g(w−hv))/2h, error O(h²). Forward: (g(w+hv) − g(w))/h, error
    O(h), and g(w) is evaluated once, or not at all where ``upper_gradient``, ∂f/∂u as the
    lower step has already computed it, is given. ``epsilon`` is a length in the space of w;
    see `default_epsilon`. DARTS, arXiv:1806.09055 Eq. 8.

    ``point`` is w, in memory of its own; the lower variables are left anywhere, and whoever
    makes the product puts them back.
    """

    objective: Objective
    point: Sequence[Tensor]
    epsilon: float | None = None
    scheme: Scheme = "central"
    upper_gradient: Vector | None = None
    _unmoved: dict[str, Vector] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.upper_gradient is not None:
            self._unmoved["upper"] = self.upper_gradient

    def hessian(self, v: Vector) -> Vector:
        """∂²f/∂w² v, by differences of ∂f/∂w."""
        return self._difference("lower", self.objective.lower.variables, v)

    def mixed(self, v: Vector) -> Vector:
        """∂²f/∂u∂w v, by differences of ∂f/∂u."""
        return self._difference("upper", self.objective.upper.variables, v)

    def tangent(self, v: Vector, e: Vector) -> Vector:
        """∂²f/∂w² v + ∂²f/∂w∂u e, by differences of ∂f/∂w with both w and u displaced."""
        with perturbed(self.objective.upper.variables) as here:
            return self._difference("lower", self.objective.lower.variables, v, (here, e))

    def _difference(
        self,
        level: str,
        variables: tuple[Tensor, ...],
        v: Vector,
        upper: tuple[Sequence[Tensor], Vector] | None = None,
    ) -> Vector:
        """``upper``: where u is and the direction that it moves along, if it moves too."""
        square = inner(v, v) if upper is None else inner(v, v) + inner(upper[1], upper[1])
        # Half of the scale at a time: all of it may be beyond float32 where v is tiny.
        root = (self._length / square.sqrt()).sqrt()
        root = torch.where(square > 0, root, 0.0)  # nothing moves along a v of zero
        moves = [(self.objective.lower.variables, self.point, (v * root).mul_(root))]
        if upper is not None:
            along = (upper[1] * root).mul_(root)
            moves.append((self.objective.upper.variables, upper[0], along))

        def gradient(side: float) -> Vector:
            for moved, here, along in moves:
                assign_(moved, here, along.parts, side)
            return self.objective.gradient(variables)

        ahead = gradient(1.0)
        if self.scheme == "central":
            behind, root = gradient(-1.0), 2**0.5 * root
        else:
            if level not in self._unmoved:
                self._unmoved[level] = gradient(0.0)
            behind = self._unmoved[level]
        back = torch.where(square > 0, 1 / root, 0.0)
        return ahead.add_(behind, -1.0).mul_(back).mul_(back)

    @cached_property
    def _length(self) -> float | Tensor:
        """The length of a step in the space of w, once for the point."""
        return self.epsilon or default_epsilon(
            self.point,
            self.scheme,
            differences(self.objective.lower),
            beside=self.objective.upper.variables,
        )


def default_epsilon(
    point: Sequence[Tensor],
    scheme: Scheme = "central",
    differences: int = 0,
    *,
    beside: Sequence[Tensor] = (),
) -> Tensor:
    """(δ·(1 + ‖w‖))^(1/(1+p)), δ the machine epsilon of the coarsest part of w and ``beside``.

    p is 2 for the central and 1 for the forward scheme. The length balances the truncation
    error, O(ε^p), and the rounding error, O(δ/ε), of a
    difference quotient (Knoll & Keyes 2004, doi:10.1016/j.jcp.2003.08.010, §2.3). Balanced, they
    are O(δ^(2/3)) for the central scheme: the δ of a gradient that is itself made of differences.
    """
    delta = machine_epsilon((*point, *beside)) ** ((2 / 3) ** differences)
    order = 2 if scheme == "central" else 1
    length: Tensor = reductions.summed(reductions.squares(point, wide=False)).sqrt()
    return (1 + length).mul(delta).pow(1 / (1 + order))


@contextmanager
def _without_reducers() -> Iterator[None]:
    """Forward passes after which DistributedDataParallel models expect no ``backward``.

    Raises:
        ProblemError: a module's parameters are sharded.
    """
    if not distributed.initialised():
        yield
        return
    silenced = []

    def silence(module: nn.Module, _inputs: object) -> None:
        if distributed.shards(module):
            raise ProblemError(SHARDED)
        if isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync:
            module.require_backward_grad_sync = False
            silenced.append(module)

    hook = nn.modules.module.register_module_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()
        for module in silenced:
            module.require_backward_grad_sync = True


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Backward passes of an exact product, with advice where an operation refuses them.

    Checkpointed parts of the loss run again in them, so the attention kernel is chosen here too.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not lacks_second_derivative(error):
            raise
        raise ProblemError(
            f"the lower loss has no second derivative ({error}); "
            'choose product="difference", which needs first-order passes only'
        ) from error
