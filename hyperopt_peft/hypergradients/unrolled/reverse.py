"""The gradient through steps of the lower optimizer, in reverse mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hyperopt_peft.core.problem import Problem, StepRecord
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from hyperopt_peft.utils.distributed import is_sharded
from hyperopt_peft.utils.restore import assign_, perturbed
from hyperopt_peft.utils.validation import PositiveFloat, PositiveInt
from hyperopt_peft.utils.vector import zeros_like


@register("unrolled", kind="unrolled")
@dataclass(frozen=True)
class Unrolled(Estimator):
    """dF/du = ∂F/∂u + (dw_K/du)ᵀ ∂F/∂w, where w_K = Φ(…Φ(w_0, u)…, u) after K = ``steps`` steps.

    Φ is the step of the lower optimizer with clipping, a `DifferentiableStep`. The adjoint λ_k of
    w_k runs backwards from λ_K = ∂F/∂w:

        ḡ_k, λ_k, … ← vjp of Φ at (w_k, g_k, optimizer state);   g_k = ∂f/∂w(w_k, u)
        dF/du += ∂²f/∂u∂w · ḡ_k;   λ_k += ∂²f/∂w² · ḡ_k

    Each step costs one forward+backward pass and one product with both second derivatives. Memory
    holds the graph of one step, and w, ∂f/∂w and the optimizer's state of all K steps.

    Training differentiates the last K steps, with their batches and dropout masks. Outside training
    K steps from the current w are simulated, and ∂F/∂w is taken at the current w. Franceschi et al.
    2017, arXiv:1703.01785, Alg. 1; truncation: Shaban et al. 2019, arXiv:1810.10667.

    Raises:
        ProblemError: the lower optimizer cannot be differentiated (`DifferentiableStep`), or a
            variable is sharded.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("unrolled:steps=5").cost()
        21
    """

    steps: PositiveInt = 1
    product: ProductKind = "exact"
    epsilon: PositiveFloat | None = None

    @property
    def requirements(self) -> Requirements:
        """Records of the last ``steps`` lower steps, with the optimizer's state."""
        return Requirements(
            history=self.steps,
            optimizer_state=True,
            second_derivatives=self.product == "exact",
            differences=self.product == "difference",
        )

    def cost(self) -> int:
        """One pass of F and four for each step: f, its graph (two), and the product."""
        return 1 + 4 * self.steps

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError for sharded variables, and as `DifferentiableStep`."""
        self.require(
            not is_sharded(*upper.variables, *lower.variables),
            "does not support FSDP's shards; choose sama, darts, or a solver with "
            'product="difference"',
        )
        if lower.optimizer is not None:
            DifferentiableStep(lower, lower.optimizer_snapshot(with_state=False))

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, adjoint = oracle.upper_gradient.direct, oracle.upper_gradient.b
        optimizer, steps = last_steps(oracle, self.steps)
        implicit = zeros_like(direct)
        moment_adjoint: list[Tensor] | None = None
        for step in reversed(steps):
            w_bar, g_bar, moment_adjoint = optimizer.vjp(step, adjoint, moment_adjoint)
            with oracle.product(self.product, at=step, epsilon=self.epsilon) as product:
                if step is steps[0]:
                    implicit = implicit + product.mixed(g_bar)
                else:
                    hessian, mixed = product.both(g_bar)
                    implicit, adjoint = implicit + mixed, w_bar + hessian
        return Estimate(direct, implicit, steps=len(steps))


def last_steps(oracle: Oracle, count: int) -> tuple[DifferentiableStep, Sequence[StepRecord]]:
    """The lower optimizer's step as a function, and the recorded (or ``count`` simulated) steps."""
    lower = oracle.lower
    state = oracle.last.optimizer if oracle.last else lower.optimizer_snapshot(with_state=True)
    optimizer = DifferentiableStep(lower, state)
    if oracle.history:
        return optimizer, oracle.history
    steps: list[StepRecord] = []
    point = tuple(variable.detach().clone() for variable in lower.variables)
    while True:
        with perturbed(lower.variables):
            assign_(lower.variables, point)
            gradient = oracle.differentiate_lower()
        steps.append(
            StepRecord(oracle.lower_batch, oracle.lower_random, point, gradient, None, state)
        )
        if len(steps) == count:
            return optimizer, steps
        point, state = optimizer.advance(steps[-1])
