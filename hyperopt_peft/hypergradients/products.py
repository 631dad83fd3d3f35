"""Second-derivative products of the lower objective f at one point.

    hessian(v) = ∂²f/∂w² v     mixed(v) = ∂²f/∂u∂w v     both(v, e)[0] = ∂²f/∂w² v + ∂²f/∂w∂u e

All products use one batch and one random state. `ExactProduct` differentiates ∂f/∂w;
`DifferenceProduct` needs first-order passes only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.core.validation import unwritten
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils import distributed, reductions
from hyperopt_peft.utils.autograd import (
    graph_nodes,
    lacks_second_derivative,
    once_differentiable_functions,
    raises_when_differentiated,
)
from hyperopt_peft.utils.models import NO_DIFFERENCE, rounds_activations
from hyperopt_peft.utils.random_state import RandomState, replay
from hyperopt_peft.utils.restore import Buffers, assign_, perturbed
from hyperopt_peft.utils.vector import Vector, inner, machine_epsilon

ProductKind = Literal["exact", "difference"]
Scheme = Literal["central", "forward"]
DIFFERENCE = 'choose product="difference", which needs first-order passes only'
SHARDED = f"an exact product differentiates twice, which FSDP does not support; {DIFFERENCE}"
NO_EXACT_PRODUCT = f"there is no exact product; {DIFFERENCE}"


@dataclass
class Passes:
    """Counts of forward+backward passes (``gradients``) and second backward ones (``products``)."""

    gradients: int = 0
    products: int = 0
    #: Called with the number of new passes, as a progress bar's method of this name.
    update: Callable[[int], object] = field(default=lambda _: None, repr=False, compare=False)

    def count(self, *, gradients: int = 0, products: int = 0) -> None:
        """Add to the counts."""
        self.gradients += gradients
        self.products += products
        self.update(gradients + products)


@dataclass(frozen=True)
class Objective:
    """f on one batch, with the same random numbers at every evaluation.

    Each evaluation appends f, a scalar on its device, to ``losses``. NaN is not an error here:
    solvers check the numbers that they read, and `Oracle.estimate` checks the losses.
    """

    lower: Problem
    upper: Problem
    batch: Any
    random_state: RandomState
    passes: Passes
    buffers: Buffers
    losses: list[Tensor]

    def gradient(self, variables: tuple[Tensor, ...]) -> Vector:
        """∂f/∂variables at the current point, by one forward+backward pass."""
        return Vector.of(self.differentiate(variables), variables)

    def differentiate(self, variables: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """As `gradient`, in the variables' dtypes; None for a variable that f does not read."""
        self.passes.count(gradients=1)
        with self.evaluation():
            loss, _, gradient = self.lower.differentiate(self.batch, variables)
        self.losses.append(loss)
        self.buffers.restore()  # so that the next evaluation has the same function
        return gradient

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within the body, f has its random state, and must not write to a variable."""
        with replay(self.random_state), unwritten(self.upper, self.lower):
            yield


class Product(ABC):
    """Second-derivative products of f at a fixed point; see `Oracle.product`.

    Example:
        >>> from hyperopt_peft.hypergradients import open_oracle
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> oracle = open_oracle(*diabetes())
        >>> with oracle.open(), oracle.product("difference") as product:
        ...     product.hessian(oracle.upper_gradient.b).numel()
        10
    """

    objective: Objective

    def hessian(self, v: Vector) -> Vector:
        """∂²f/∂w² v, shaped like the lower variables."""
        return self._along(self.objective.lower.variables, v)

    def mixed(self, v: Vector) -> Vector:
        """∂²f/∂u∂w v, shaped like the upper variables."""
        return self._along(self.objective.upper.variables, v)

    def both(self, v: Vector, e: Vector | None = None) -> tuple[Vector, Vector]:
        """∂²f/∂w² v and ∂²f/∂u∂w v at the cost of one; ``e`` adds the derivative along e in u."""
        w, u = self.objective.lower.variables, self.objective.upper.variables
        parts = self._along((*w, *u), v, e).parts
        return Vector(parts[: len(w)]), Vector(parts[len(w) :])

    @abstractmethod
    def lower_gradient(self) -> tuple[Tensor | None, ...]:
        """∂f/∂w in the variables' dtypes; costs a pass unless the graph already has it."""

    @abstractmethod
    def _along(self, variables: tuple[Tensor, ...], v: Vector, e: Vector | None = None) -> Vector:
        """∂(⟨∂f/∂w, v⟩ + ⟨∂f/∂u, e⟩)/∂variables; None is e = 0."""


class ExactProduct(Product):
    """Products by double backward through one autograd graph (Pearlmutter 1994).

    Attention runs in PyTorch's math kernel, the only one with a second derivative. A custom
    ``autograd.Function`` whose backward pass is not differentiable, and a sharded module, are a
    ProblemError. A product is an average over the processes.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        objective.passes.count(gradients=1)
        with objective.evaluation(), sdpa_kernel(SDPBackend.MATH), _without_reducers():
            loss, _ = objective.lower.evaluate(objective.batch)
        objective.losses.append(distributed.average(loss))
        self._loss = loss
        self.gradient = self._slopes(objective.lower.variables)

    def lower_gradient(self) -> tuple[Tensor | None, ...]:
        """∂f/∂w from the graph; zero for a variable that f does not read."""
        w = self.objective.lower.variables
        return tuple(distributed.mean([part.detach() for part in self.gradient], w))

    @cached_property
    def _upper_gradient(self) -> tuple[Tensor, ...]:
        """∂f/∂u, with its graph."""
        return self._slopes(self.objective.upper.variables)

    def _along(self, variables: tuple[Tensor, ...], v: Vector, e: Vector | None = None) -> Vector:
        self.objective.passes.count(products=1)
        slopes = list(zip(self.gradient, v, strict=True))
        if e is not None:
            slopes += zip(self._upper_gradient, e, strict=True)
        pairs = [(g, x.to(g)) for g, x in slopes if g.requires_grad]
        if not pairs:  # f is linear
            return Vector.of([None] * len(variables), variables)
        outputs, cotangents = zip(*pairs, strict=True)
        with self._second_derivatives():
            result = torch.autograd.grad(
                outputs, variables, cotangents, retain_graph=True, allow_unused=True
            )
        return Vector.of(distributed.mean(result, variables), variables)

    def _slopes(self, variables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """∂f/∂variables with its graph, zero for a variable that f does not read."""
        loss = self._loss
        with self._second_derivatives():
            slopes = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
            # Autograd raises no error for a marked function whose node is not on a path.
            marked = once_differentiable_functions(loss)
            if marked or any(map(raises_when_differentiated, graph_nodes(slopes))):
                names = ", ".join(marked) or "a function"
                raise RuntimeError(f"{names} is differentiable once, not twice")
            return slopes

    @contextmanager
    def _second_derivatives(self) -> Iterator[None]:
        """Turn an error about a missing second derivative in the body into a ProblemError."""
        try:
            with sdpa_kernel(SDPBackend.MATH):  # checkpoints rerun forward passes here
                yield
        except RuntimeError as error:
            if not lacks_second_derivative(error):
                raise
            rounded = any(map(rounds_activations, self.objective.buffers.modules))
            advice = f"choose {NO_DIFFERENCE}" if rounded else DIFFERENCE
            raise ProblemError(
                f"the lower loss has no second derivative ({error}); {advice}"
            ) from error


@dataclass
class DifferenceProduct(Product):
    """Products by finite differences of g = ∂f/∂w or ∂f/∂u along v, with h = epsilon/‖v‖.

        central   (g(w+hv) − g(w−hv))/2h    error O(h²)
        forward   (g(w+hv) − g(w))/h        error O(h)

    DARTS, arXiv:1806.09055 Eq. 8. A product moves the lower variables; the caller restores them.
    """

    objective: Objective
    point: Sequence[Tensor]  # a copy of w
    epsilon: float | None = None  # the 2-norm of the change of w; `default_epsilon` if None
    scheme: Scheme = "central"
    upper_gradient: Vector | None = None  # ∂f/∂u at w, if known, for a forward difference

    def lower_gradient(self) -> tuple[Tensor | None, ...]:
        """∂f/∂w at ``point``, by one forward+backward pass."""
        w = self.objective.lower.variables
        assign_(w, self.point)
        return self.objective.differentiate(w)

    def _along(self, variables: tuple[Tensor, ...], v: Vector, e: Vector | None = None) -> Vector:
        of_w = (self.objective.lower.variables, self.point, v)
        if e is None:
            return self._difference(variables, of_w)
        u = self.objective.upper.variables
        with perturbed(u) as here:
            return self._difference(variables, of_w, (u, here, e))

    def _difference(
        self,
        variables: tuple[Tensor, ...],
        *moves: tuple[tuple[Tensor, ...], Sequence[Tensor], Vector],
    ) -> Vector:
        """A difference of ∂f/∂variables; ``moves`` are (tensors, their values, a direction)."""
        square = reductions.total([inner(along, along) for _, _, along in moves])
        # The factor epsilon/‖v‖ may overflow float32 for a tiny v; its square root does not.
        root = (self._length / square.sqrt()).sqrt()
        root = torch.where(square > 0, root, 0.0)  # v = 0
        steps = [(moved, here, (along * root).mul_(root)) for moved, here, along in moves]

        def gradient(side: float) -> Vector:
            for moved, here, step in steps:
                assign_(moved, here, step.parts, side)
            return self.objective.gradient(variables)

        ahead = gradient(1.0)
        if self.scheme == "central":
            behind, root = gradient(-1.0), 2**0.5 * root
        elif self.upper_gradient is not None and variables is self.objective.upper.variables:
            behind = self.upper_gradient
        else:
            behind = gradient(0.0)
        back = torch.where(square > 0, 1 / root, 0.0)
        return ahead.add_(behind, -1.0).mul_(back).mul_(back)

    @cached_property
    def _length(self) -> float | Tensor:
        """The 2-norm of the perturbation of w."""
        return self.epsilon or default_epsilon(
            self.point,
            self.scheme,
            self.objective.lower.differences,
            beside=self.objective.upper.variables,
        )


def default_epsilon(
    point: Sequence[Tensor],
    scheme: Scheme = "central",
    differences: int = 0,
    *,
    beside: Sequence[Tensor] = (),
) -> Tensor:
    """ε = (δ·(1 + ‖w‖))^(1/(1+p)), δ the largest machine epsilon of w and ``beside``.

    p is 2 for the central and 1 for the forward scheme. ε balances the truncation error O(ε^p) and
    the rounding error O(δ/ε) of a difference quotient (Knoll & Keyes 2004,
    doi:10.1016/j.jcp.2003.08.010, §2.3). Both are O(δ^(2/3)) for the central scheme. If the
    gradient itself has ``differences`` nested differences, δ^(2/3) replaces δ that many times.
    """
    delta = machine_epsilon((*point, *beside)) ** ((2 / 3) ** differences)
    order = 2 if scheme == "central" else 1
    length: Tensor = reductions.total(reductions.squares(point)).sqrt()
    return (1 + length).mul(delta).pow(1 / (1 + order))


@contextmanager
def _without_reducers() -> Iterator[None]:
    """Within the body, forward passes of DDP expect no ``backward``; shards are a ProblemError."""
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

    try:
        with nn.modules.module.register_module_forward_pre_hook(silence):
            yield
    finally:
        for module in silenced:
            module.require_backward_grad_sync = True
