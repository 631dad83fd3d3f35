"""The hypergradient without its implicit term."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.vector import zeros_like


@register("direct", kind="direct")
@dataclass(frozen=True)
class Direct(Estimator):
    """dF/du ≈ ∂F/∂u, without the implicit term.

    The cost is one forward+backward pass. This is first-order DARTS (ξ = 0): Liu, Simonyan & Yang
    2019, arXiv:1806.09055 §2.3.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("direct").cost()
        2
    """

    def estimate(self, oracle: Oracle) -> Estimate:
        """∂F/∂u at the oracle's point."""
        direct = oracle.upper_gradient.direct
        return Estimate(direct, zeros_like(direct))

    def cost(self) -> int:
        """The passes of F and f."""
        return 2
