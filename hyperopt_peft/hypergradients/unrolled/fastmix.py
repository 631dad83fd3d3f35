"""One unrolled gradient step of the output layer alone."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.dots import Dots, output_gradient, output_layer
from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.validation import NonNegativeFloat


@register("fastmix", kind="identity")
@dataclass(frozen=True)
class FastMix(Estimator):
    """dF/du ≈ ∂F/∂u − ξ Σ_g ∂f'_g/∂u ⟨∇_V F, ∇_V ℓ_g⟩, with V the output layer's weight.

    The estimate is that of `DARTS` with ``product="dots"`` for a step of V in place of w; V may
    be frozen or tied. f'_g = ∂f/∂ℓ_g, which is v_k for the loss of source k. The lower level's
    model has ``get_output_embeddings()`` and calls this layer, as models of Transformers do; a
    fused head does not. FastMix, 2026, arXiv:2606.14971.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("fastmix").requirements.lower_pass
        True
    """

    xi: NonNegativeFloat = 1.0

    @property
    def requirements(self) -> Requirements:
        """The last lower step, and its pass."""
        return Requirements(history=1, lower_pass=True)

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError as `Estimator.check_levels` and `output_layer`."""
        super().check_levels(upper, lower)
        output_layer(lower)

    def observe(self, oracle: Oracle) -> Dots:
        """The dot products with ∇_V F."""
        with output_gradient(oracle.lower) as gradient:
            oracle.upper_gradient  # noqa: B018
        return Dots(oracle.lower, {output_layer(oracle.lower): (gradient(), None)})

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        at = oracle.history[-1] if oracle.history else None
        dots = oracle.observed or oracle.observe(self.observe(oracle), at)
        mixed = dots.mixed(oracle.upper.variables)
        return Estimate(oracle.upper_gradient.direct, -self.xi * mixed)

    def cost(self) -> Cost:
        """F and f, twice."""
        return Cost(3, 3, 5)
