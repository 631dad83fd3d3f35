"""∂²f/∂u∂w·b for a loss that weights rows or labels, from dot products in one backward pass.

    f = weighted(ℓ_1, …, ℓ_n; u)     ∂²f/∂u∂w·b = Σ_i ∂f'_i/∂u ⟨∇ℓ_i, b⟩,   f'_i = ∂f/∂ℓ_i

For a linear layer y = xWᵀ + c, output gradients δ_t = ∂f/∂y_t and a direction (B, d) of (W, c),

    ⟨∂f/∂W, B⟩ + ⟨∂f/∂c, d⟩ = Σ_t δ_t·(B x_t + d)

The terms of row i, summed over all layers, are f'_i ⟨∇ℓ_i, b⟩. So any backward pass of f yields
the dot products of all rows: the "ghost dot product" of Wang et al. 2024, arXiv:2406.11011. The
method needs no second derivative, no difference and no pass in float32, so that the loss may use
any attention kernel, frozen quantised layers and gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.core.labels import has_fused_head, is_mean_over_labels
from hyperopt_peft.core.prior import prior_value
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.autograd import uncompiled, without_autocast
from hyperopt_peft.utils.distributed import gather
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.vector import Vector, inner, widened

#: The direction (B, d) for the weight and bias of a layer; None for one that is not a variable.
Direction = tuple[Tensor | None, Tensor | None]
ADVICE = "choose product=difference, or another estimator"
UNCALLED = "does not call the model's output layer (a fused head does not)"


@dataclass
class _Evaluation:
    """One evaluation of the losses, with sums of f'_i ⟨∇ℓ_i, b⟩ by the shape of a layer's input."""

    batch: Any
    losses: Tensor
    sums: dict[tuple[torch.Size, torch.device], Tensor] = field(default_factory=dict)


class Dots:
    """The dot products ⟨∇ℓ_i, b⟩ of all rows or labels, from passes of a level's loss in `observe`.

    Labels of one document must have one weight, since the losses of later tokens reach earlier
    inputs.

    ``directions`` has b by layer; ``along`` is b as a vector shaped like the level's variables, or
    None if b has another shape, and ``layers`` has the level's `linear_layers` then.
    """

    def __init__(
        self,
        level: Problem,
        directions: Mapping[nn.Module, Direction],
        along: Vector | None = None,
        layers: Mapping[nn.Linear, tuple[int | None, int | None]] | None = None,
    ) -> None:
        self.level, self.directions = level, directions
        self.along, self.layers = along, layers or {}
        self.examples = weighted_rows(level)
        self._evaluations: list[_Evaluation] = []
        self._called: set[nn.Module] = set()
        self._epsilon = 0.0

    @classmethod
    def of(cls, level: Problem, along: Vector) -> Dots:
        """The dot products with ``along``, shaped like the level's variables."""
        parts: dict[int | None, Tensor] = dict(enumerate(map(gather, along)))
        layers = linear_layers(level)
        directions: dict[nn.Module, Direction] = {
            layer: (parts.get(weight), parts.get(bias)) for layer, (weight, bias) in layers.items()
        }
        return cls(level, directions, along, layers)

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Collect the dot products of the forward and backward passes in the body.

        Each backward pass must come before the next forward pass.
        """
        with uncompiled(), ExitStack() as stack:
            for layer, direction in self.directions.items():
                tap = partial(self._tap, direction)
                stack.callback(layer.register_forward_hook(tap, with_kwargs=True).remove)
            losses = self.examples.losses
            if "losses" in vars(self.examples):
                stack.callback(setattr, self.examples, "losses", losses)
            else:
                stack.callback(delattr, self.examples, "losses")
            self.examples.losses = partial(self._begin, losses)  # type: ignore[method-assign]
            yield

    def _begin(self, losses: Callable[[Any], Tensor], batch: Any) -> Tensor:
        result = losses(batch)
        self._evaluations.append(_Evaluation(batch, result.detach()))
        return result

    def _tap(
        self,
        direction: Direction,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None
        x = args[0] if args else kwargs["input"]
        self._called.add(layer)
        self._epsilon = max(self._epsilon, torch.finfo(output.dtype).eps)
        weight, bias = (None if part is None else part.to(output.dtype) for part in direction)
        result: Tensor = _Tap.apply(output, x.detach().to(output.dtype), weight, bias, self._add)
        return result

    def _add(self, dots: Tensor) -> None:
        sums, key = self._evaluations[-1].sums, (dots.shape, dots.device)
        sums[key] = sums[key] + dots if key in sums else dots

    def check(self, gradient: Sequence[Tensor | None]) -> None:
        """Raise ProblemError unless the dot products sum to ⟨``gradient``, b⟩, up to rounding.

        ``gradient`` is ∂f/∂w from the observed passes, averaged over the processes.
        """
        names, w = self.level.names, self.level.variables
        if self.along is None:
            if not self._called:
                raise refusal(self.level, UNCALLED)
            return
        for layer, numbers in self.layers.items():
            unseen = [names[k] for k in numbers if k is not None and gradient[k] is not None]
            if unseen and layer not in self._called:
                raise refusal(self.level, f"reads variable {unseen[0]!r} without calling its layer")
        slope = Vector.of(gradient, w)
        if self.level.prior is not None:
            term = prior_value(self.level.prior, w, self.level.name)
            slope = slope - Vector.of(torch.autograd.grad(term, w, allow_unused=True), w)
        here = torch.zeros(2, dtype=torch.float64, device=w[0].device)
        for dots in (x for e in self._evaluations for x in e.sums.values()):
            here += torch.stack([dots.sum(), dots.abs().sum()]).to(here)
        here = distributed.average(here)
        total, size, expected = to_floats([*here, inner(slope, self.along)])
        if abs(total - expected) > self._epsilon**0.5 * size:
            raise refusal(
                self.level,
                f"has a derivative of {expected:.6g}, but the dot products of its layers sum to "
                f"{total:.6g}: it uses a weight outside its layer, or w outside losses",
            )

    def mixed(self, variables: Sequence[Tensor]) -> Vector:
        """∂²f/∂u∂w·b for the upper ``variables`` u, averaged over the processes."""
        total: list[Tensor | None] = [None] * len(variables)
        for evaluation in self._evaluations:
            losses = evaluation.losses.clone().requires_grad_()
            with torch.enable_grad():
                f = self.examples.weighted(losses, evaluation.batch)["loss"]
                (slope,) = torch.autograd.grad(f, losses, create_graph=True)
            sums = self._by_loss(evaluation)
            dots = torch.where(slope == 0, 0, sums / slope.detach())
            if slope.requires_grad:
                of_u = torch.autograd.grad(slope, variables, dots.to(slope), allow_unused=True)
                total = [b if a is None else a if b is None else a + b for a, b in zip(total, of_u)]
        return Vector.of(distributed.mean(total, variables), variables)

    def _by_loss(self, evaluation: _Evaluation) -> Tensor:
        """f'_i ⟨∇ℓ_i, b⟩ for each of the losses."""
        count, result = len(evaluation.losses), torch.zeros_like(widened(evaluation.losses))
        for (shape, _), dots in evaluation.sums.items():
            if shape[:1] != (count,) and dots.numel() != count:
                raise ProblemError(
                    f"{self.level.name}: dot products: {count} weights do not fit a layer's input "
                    f"of shape {(*shape, '…')}; {ADVICE}"
                )
            result += dots.reshape(count, -1).sum(1).to(result)
        return result


class _Tap(torch.autograd.Function):
    """y, with a backward pass that calls ``add`` with δ·(Bx + d) for each row or token.

    Bx + d, or x if it is smaller, is saved for backward, so that gradient checkpoints recompute it.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, add: Any
    ) -> Tensor:
        narrow = weight is None or weight.shape[0] <= weight.shape[1]
        ctx.add, ctx.transposed, ctx.bias = add, None if narrow else weight, None
        if weight is None:
            saved = bias
        elif narrow:
            saved = linear(x, weight, bias)
        else:
            saved, ctx.bias = x, bias
        ctx.save_for_backward(saved)
        ctx.mark_dirty(y)  # else an operation in place on y would raise
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        slope = delta if ctx.transposed is None else delta @ ctx.transposed
        dots = (widened(slope) * widened(saved)).sum(-1)
        if ctx.bias is not None:
            dots = dots + widened(delta) @ widened(ctx.bias)
        ctx.add(dots)
        return delta, None, None, None, None


def weighted_rows(level: Problem) -> WeightedRows:
    """The `WeightedRows` that ``level`` is or evaluates; raises ProblemError without one."""
    examples = level.examples
    if not isinstance(examples, WeightedRows):
        raise ProblemError(f"{level.name}: dot products need a level of WeightedRows; {ADVICE}")
    if not is_mean_over_labels(examples.row_losses):
        raise refusal(level, "is by row_losses, and a row's may read other rows")
    return examples


def linear_layers(level: Problem) -> dict[nn.Linear, tuple[int | None, int | None]]:
    """For each layer, the indices of its weight and bias among the variables of ``level``.

    Raises ProblemError for a variable of no ``nn.Linear`` of the model, or of a fused head.
    """
    number = {id(variable): k for k, variable in enumerate(level.variables)}
    model: Any = weighted_rows(level).model
    layers = {
        layer: numbers
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        and (numbers := (number.get(id(layer.weight)), number.get(id(layer.bias)))) != (None, None)
    }
    indices = {k for numbers in layers.values() for k in numbers}
    for k, name in enumerate(level.names):
        if k not in indices:
            raise ProblemError(
                f"{level.name}: dot products need weights or biases of linear layers as variables, "
                f"and {name!r} is neither; {ADVICE}"
            )
    if has_fused_head(model) and layers.keys() & {*model.get_output_embeddings().modules()}:
        raise refusal(level, UNCALLED)
    return layers


def refusal(level: Problem, reason: str) -> ProblemError:
    """The error for a loss of ``level`` whose dot products would be wrong."""
    return ProblemError(f"{level.name}: dot products: the loss {reason}; {ADVICE}")
