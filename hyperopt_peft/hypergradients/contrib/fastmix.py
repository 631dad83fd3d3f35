"""One unrolled gradient step of the output layer alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.core.labels import has_fused_head
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.dots import ADVICE, UNCALLED, Dots, refusal, weighted_rows
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils import distributed
from hyperopt_peft.utils.autograd import without_autocast
from hyperopt_peft.utils.validation import NonNegativeFloat


@register("fastmix", kind="identity")
@dataclass(frozen=True)
class FastMix(Estimator):
    """dF/du ≈ ∂F/∂u − ξ Σ_i ∂f'_i/∂u ⟨∇_V F, ∇_V ℓ_i⟩, with V the output layer's weight.

    The estimate is `DARTS` with ``product="dots"``, where V takes the place of w; V may be frozen
    or tied. f'_i = ∂f/∂ℓ_i is the weight of row i. The model of the lower
    level must have ``get_output_embeddings()`` and call this layer, as models of Transformers do; a
    fused head does not. FastMix, 2026, arXiv:2606.14971.

    Raises:
        ProblemError: the lower level does not weight rows, or does not call an output layer.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("fastmix").requirements.observe
        True
    """

    xi: NonNegativeFloat = 1.0

    @property
    def requirements(self) -> Requirements:
        """The last lower step, and dot products from its pass."""
        return Requirements(history=1, observe=True)

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError as `output_layer`."""
        output_layer(lower)

    def observe(self, oracle: Oracle) -> Dots:
        """The dot products with ∇_V F, where a tied V's use as input embedding is left out."""
        layer, total = output_layer(oracle.lower), list[Tensor]()

        @without_autocast
        def add(x: Tensor, delta: Tensor) -> None:
            total[:] = [sum(total, delta.flatten(0, -2).mT @ x.flatten(0, -2))]

        def tap(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and output.requires_grad:
                output.register_hook(partial(add, args[0].detach().to(output.dtype)))

        with layer.register_forward_hook(tap):
            oracle.upper_gradient  # noqa: B018
        if not total:
            raise ProblemError(f"{oracle.lower.name}: the upper loss {UNCALLED}; {ADVICE}")
        return Dots(oracle.lower, {layer: (distributed.average(total[0]), None)})

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        dots = oracle.dots or oracle.observe(self.observe(oracle), oracle.last)
        mixed = dots.mixed(oracle.upper.variables)
        return Estimate(oracle.upper_gradient.direct, -self.xi * mixed)

    def cost(self) -> int:
        """The passes of F and f, and one more of f outside the Trainer."""
        return 3


def output_layer(level: Problem) -> nn.Module:
    """The output layer that the model in ``level`` calls; raises ProblemError without one."""
    model = weighted_rows(level).model
    if has_fused_head(model):
        raise refusal(level, UNCALLED)
    modules: Iterator[Any] = model.modules()  # a wrapper for processes has no such method
    owners = (each for each in modules if hasattr(each, "get_output_embeddings"))
    layer: nn.Module | None = next((each.get_output_embeddings() for each in owners), None)
    if layer is None:
        raise ProblemError(
            f"{level.name}: {type(model).__name__} has no get_output_embeddings(), the layer that "
            "the estimator differentiates; choose darts with product=dots"
        )
    return layer
