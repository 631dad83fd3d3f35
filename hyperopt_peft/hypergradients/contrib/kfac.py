"""Kronecker-factored curvature of linear layers, as a preconditioner or instead of H."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.contrib.kronecker import Fisher, Samples, empirical_fisher
from hyperopt_peft.hypergradients.contrib.linear_calls import Layer, linear_calls
from hyperopt_peft.hypergradients.implicit.cg import conjugate_gradients
from hyperopt_peft.hypergradients.implicit.solver import Advance, Matvec, Solution, Solver
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.distributed import is_sharded
from hyperopt_peft.utils.validation import Fraction, NonNegativeInt, PositiveFloat
from hyperopt_peft.utils.vector import Vector, widened, zeros_like


@register("kfac", kind="implicit", tolerance=1e-2)
@dataclass(frozen=True)
class KFAC(Solver):
    """v ≈ (H + damping·I)⁻¹ b by ``steps`` steps of CG, preconditioned by EK-FAC of linear layers.

    f is a mean over rows i. For a layer y = xWᵀ ([x 1] in place of x if it has a bias), δ = ∂f_i/∂y
    and sums over the tokens t of a row,

        A = mean xxᵀ = Q_A diag(a) Q_Aᵀ        S = mean over rows Σ_t δδᵀ = Q_S diag(s) Q_Sᵀ
        Λ = mean over rows (Q_Sᵀ (Σ_t δ xᵀ) Q_A)²
        P⁻¹ R = Q_S [ Q_Sᵀ R Q_A / (Λ + damping) ] Q_Aᵀ

    P is the *empirical* Fisher matrix of f's rows; it omits terms such as a weight decay. P changes
    only the rate of convergence: v, the note and the residual mean the same as in ``cg``. With
    ``steps=0``, v = P⁻¹b; scaling f by c then divides v by c² instead of c.

    A layer is a call of ``torch.nn.functional.linear`` (such as ``nn.Linear`` and LoRA's A and B)
    or of ``x @ V`` whose weight or bias is a lower variable. Rows are the first dimension of the
    input; tokens are the dimensions between the first and the last. A variable outside such layers,
    or in a layer without a gradient, gets the mean of all Λ as its eigenvalue. A dimension above
    2,048 uses the identity as its eigenbasis. If f has no linear layer, the estimator is ``cg``.

    ``damping=None`` adds each layer's mean Λ to P, and nothing to H. The cost is one
    forward+backward pass, and one Hessian-vector product a step. Martens & Grosse 2015,
    arXiv:1503.05671; EK-FAC: George et al. 2018, arXiv:1806.03884; with tokens and a damping:
    Grosse et al. 2023, arXiv:2308.03296 §2.3, 3; as a hypergradient: arXiv:2603.29108.

    Raises:
        ProblemError: the lower level is sharded or `Nested`; or ``steps=0`` and f has no linear
            layer.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("kfac:steps=5")
        KFAC(product='exact', epsilon=None, steps=5, damping=None, tolerance=1e-06)
    """

    steps: NonNegativeInt = 10
    damping: PositiveFloat | None = None
    tolerance: Fraction = 1e-6

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError if the lower level is sharded or `Nested`."""
        advice = 'choose another solver, such as "cg", with product="difference"'
        self.require(
            not is_sharded(*lower.variables),
            f"{lower.name} is sharded, and kfac needs the full weight of a layer; {advice}",
        )
        lower.require_single(f"kfac supports two levels only; {advice}")

    def estimate(self, oracle: Oracle, advance: Advance | None = None) -> Estimate:
        """dF/du at the oracle's point."""
        inverse = self.inverse(oracle) if oracle.upper_gradient.norm else None
        return super().estimate(oracle, lambda matvec, b, _: (self.solve(matvec, b, inverse), {}))

    def inverse(self, oracle: Oracle) -> Matvec | None:
        """P⁻¹ for f at the oracle's point; None if f has no linear layer."""
        blocks = empirical_fisher(
            layer_samples(oracle),
            [widened(variable.detach()) for variable in oracle.lower.variables],
        )
        self.require(
            bool(blocks) or self.steps > 0,
            f"{oracle.lower.name} calls no linear layer whose weight or bias is a lower variable; "
            'take steps=10, or choose a solver such as "minres"',
        )
        return Fisher(blocks, self.damping).inverse if blocks else None

    def solve(self, matvec: Matvec, b: Vector, inverse: Matvec | None = None) -> Solution:
        """v ≈ (H + damping·I)⁻¹ b, where ``inverse`` applies P⁻¹."""
        if self.steps == 0 and inverse is not None:
            return Solution(inverse(b), None, 0)
        limits = self.steps, self.damping or 0.0, self.tolerance, self.rounding(b)
        solution = conjugate_gradients(matvec, b, *limits, precondition=inverse)
        if solution.note and solution.residual == 1 and inverse is not None:  # v is still 0
            note = f"{solution.note}; the result is P⁻¹b, from the preconditioner P alone"
            solution = replace(solution, v=inverse(b), note=note)
        return solution


def layer_samples(oracle: Oracle) -> Samples:
    """The inputs and output gradients of each layer, by one forward+backward pass of f."""
    here = zeros_like(oracle.upper_gradient.b)  # before `linear_calls`, which must see f alone
    with oracle.moved() as gradients, linear_calls(oracle.lower.variables) as calls:
        gradients("lower", here)
    samples: dict[Layer, list[tuple[Tensor, Tensor]]] = {}
    for (layer, rows), (x, delta) in calls.rows().items():
        samples.setdefault(layer, []).append((x, rows * delta))  # f is a mean over rows
    return samples
